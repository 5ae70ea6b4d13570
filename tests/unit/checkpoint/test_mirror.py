"""Mirrors of checkpoints: what is uploaded, kept and fetched; kills at every point; stores that fail; damage.

Checkpoints here are folders of random bytes with a manifest; tests/end_to_end/test_mirrored_runs.py trains.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import mirrors
from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import MANIFEST, CheckpointManifest
from mmscale.checkpoint.layout import BEST, INFO, Store, info_text
from mmscale.checkpoint.mirror import downloads
from mmscale.checkpoint.mirror.generation import MirroredStep
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.checkpoint.mirror.uploads import Uploaded, Uploader
from mmscale.checkpoint.save_settings import Retention
from mmscale.errors import CheckpointError
from mmscale.runs.attempts import next_attempt
from mmscale.runtime import fail_points

pytestmark = pytest.mark.usefixtures("no_waits")

FILES = {"__0_0.distcp": 70_000, "__1_0.distcp": 300_000, "random/0": 17, ".metadata": 0}


class KilledError(BaseException):
    """Stands for a kill: nothing after it runs."""


def commit(store: Store, step: int, *, attempt: int = 1, seed: int = 0, best: int | None = None) -> Path:
    """A committed checkpoint of random files."""
    numbers = random.Random(f"{step}.{attempt}.{seed}")
    folder = store.begin(step, attempt)
    for name, size in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(numbers.randbytes(size))
    named = {} if best is None else {BEST: {"metric": "eval/loss", "step": best, "value": 1.0}}
    config = {"run": {"dir": "elsewhere", "name": "one"}}
    (store.temporary(step, attempt) / INFO).write_text(
        info_text({"step": step, "attempt": attempt, "config": config, **named})
    )
    files = integrity.digests(folder, integrity.sizes(folder))
    return store.commit(CheckpointManifest(step, attempt, "", "", {"world_size": 2}, files))


def uploader(store: Store, remote: Remote, *, keep: int = 2, **others: Any) -> Uploader:
    return Uploader(store, remote, Retention(keep, keep_every=1000), **others)


def bring(store: Store, remote: Remote, **others: Any) -> list[int]:
    """Steps that were uploaded."""
    done: list[Uploaded] = []
    uploader(store, remote, **others).bring_up_to_date(done.append)
    return [one.step for one in done]


def steps(remote: Remote) -> list[int]:
    return [one.step for one in downloads.generations(remote)]


def fetched(remote: Remote, place: Path, step: int | None = None) -> tuple[int, Path]:
    done = downloads.fetch(remote, step, Store.of_run(place))
    assert integrity.verify(done.path, step=done.step) == []
    return done.step, done.path


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_fetched_checkpoint_is_the_one_that_was_mirrored(store: Store, remote: Remote, tmp_path: Path) -> None:
    path = commit(store, 100)
    assert bring(store, remote) == [100]
    step, there = fetched(remote, tmp_path / "new")
    assert (step, content(there)) == (100, content(path))
    assert bring(store, remote) == [], "nothing is sent twice"
    assert fetched(remote, tmp_path / "new") == (100, there), "and nothing is fetched twice"


def test_the_newest_are_kept_and_those_that_a_run_keeps_for_ever(store: Store, remote: Remote) -> None:
    commit(store, 1000)
    commit(store, 1100)
    assert bring(store, remote) == [1100, 1000]
    for step in (1200, 1300, 1400):
        commit(store, step, best=1200)
        bring(store, remote)
    assert steps(remote) == [1000, 1200, 1300, 1400], "1000 by keep_every, 1200 is the best"
    assert len(remote.folders()) == 4


def test_a_mirror_that_lags_behind_sends_only_what_it_would_keep(store: Store, remote: Remote) -> None:
    for step in range(100, 600, 100):
        commit(store, step)
    assert bring(store, remote) == [500, 400]


def test_what_another_attempt_wrote_is_newer_than_a_later_step(store: Store, remote: Remote, tmp_path: Path) -> None:
    """A run that lost its newest checkpoint and went back: the mirror's last one is that of the later attempt."""
    commit(store, 900, attempt=1)
    bring(store, remote)
    store.quarantine(900)
    commit(store, 600, attempt=2)
    bring(store, remote)
    assert [(one.attempt, one.step) for one in downloads.generations(remote)] == [(1, 900), (2, 600)]
    assert fetched(remote, tmp_path / "new")[0] == 600


def test_a_step_that_is_written_again_replaces_the_old_one(store: Store, remote: Remote, tmp_path: Path) -> None:
    commit(store, 100)
    commit(store, 200)
    bring(store, remote)
    again = commit(store, 200, seed=1)  # after a roll-back, in the same attempt
    assert bring(store, remote) == [200]
    assert steps(remote) == [100, 200]
    assert content(fetched(remote, tmp_path / "new")[1]) == content(again)


def kills(count: int) -> Callable[[str], None]:
    """Ends the process at the n-th sub-step."""
    left = [count]

    def at(place: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    return at


def test_killed_anywhere(store: Store, remote: Remote, tmp_path: Path) -> None:
    """At each sub-step of an upload and of the deletion after it: whole checkpoints only, and the next call ends it."""
    for step in (100, 200):
        commit(store, step)
    bring(store, remote)
    newest = commit(store, 300)
    seen: list[int] = []
    for count in range(100):
        one = Remote(f"file://{tmp_path}/mirror_{count}")
        shutil.copytree(remote.root, one.root)
        try:
            with fail_points.handled(kills(count)):
                bring(store, one, streams=1)
        except KilledError:
            seen.append(fetched(one, tmp_path / f"at_{count}")[0])
        ended = bring(store, one) == []
        assert steps(one) == [200, 300] and len(one.folders()) == 2
        assert content(fetched(one, tmp_path / f"after_{count}")[1]) == content(newest)
        if ended and len(seen) == count:
            break
    # Each file, all of them, the manifest, the deletion.
    assert seen == [200] * (len(FILES) + 2) + [300] * 2


def test_what_was_sent_before_a_kill_is_not_sent_again(store: Store, remote: Remote) -> None:
    commit(store, 100)
    with pytest.raises(KilledError), fail_points.handled(kills(len(FILES) + 1)):
        bring(store, remote, streams=1)  # after all files, before the manifest
    (name,) = remote.folders()
    remote.store.rm(f"{remote.root}/{name}/__0_0.distcp")  # as if it had not been sent yet
    done: list[Uploaded] = []
    uploader(store, remote).bring_up_to_date(done.append)
    assert done[0].bytes == FILES["__0_0.distcp"] and steps(remote) == [100]


def test_parts_of_a_checkpoint_that_the_run_has_deleted_go(store: Store, remote: Remote) -> None:
    commit(store, 100)
    with pytest.raises(KilledError), fail_points.handled(kills(1)):
        bring(store, remote, streams=1)
    assert len(remote.folders()) == 1 and steps(remote) == []
    for step in (200, 300, 400):
        commit(store, step)
    store.prune(2, verified=[300, 400])
    bring(store, remote)
    assert steps(remote) == [300, 400] and len(remote.folders()) == 2


def test_a_checkpoint_that_is_deleted_while_it_is_sent(store: Store, remote: Remote) -> None:
    commit(store, 100)
    commit(store, 200)

    def delete(stage: str) -> None:
        if store.path(200).exists():
            store.path(200).rename(store.path(200).with_suffix(".deleted"))

    with fail_points.handled(delete):
        assert bring(store, remote, streams=1) == [100]
    assert steps(remote) == [100]


def test_a_damaged_checkpoint_is_not_published(store: Store, remote: Remote) -> None:
    commit(store, 100)
    bring(store, remote)
    file = commit(store, 200) / "__1_0.distcp"
    file.write_bytes(bytes([1, *file.read_bytes()[1:]]))
    one = uploader(store, remote)
    one.bring_up_to_date(lambda done: None)
    assert steps(remote) == [100] and "has another content" in next(iter(one.refused.values()))


@pytest.mark.parametrize("broken", ["missing", "changed", "short", "manifest", "name", "belongs"])
def test_a_mirror_that_was_damaged(store: Store, remote: Remote, tmp_path: Path, broken: str) -> None:
    """Nothing is left where it was to be fetched to."""
    commit(store, 100)
    commit(store, 200)
    bring(store, remote)
    folder = tmp_path / "mirror" / "one" / remote.folders()[-1]
    file = folder / "random/0"
    match broken:
        case "missing":
            file.unlink()
        case "changed":
            file.write_bytes(b"x" * 17)
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
        case "manifest":
            (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("17", "18"))
        case "belongs":
            other = tmp_path / "mirror" / "one" / remote.folders()[0]
            (folder / MANIFEST).write_text((other / MANIFEST).read_text())
        case "name":
            evil = integrity.read_manifest(folder)
            evil.files["../../../outside"] = evil.files["random/0"]
            (folder / MANIFEST).write_text(evil.text())
            folder.rename(folder.with_name(MirroredStep.of(evil).name))
            (folder.parent.parent / "outside").write_bytes(file.read_bytes() if file.exists() else b"")
    place = tmp_path / "new"
    with pytest.raises(CheckpointError) as failed:
        fetched(remote, place)
    said = {"missing": "is missing", "manifest": "digest", "name": "not inside", "belongs": "belongs to"}
    assert said.get(broken, "has another content") in failed.value.cause
    assert "URL@STEP" in (failed.value.remedy or "")
    assert Store.of_run(place).steps() == [] and not (tmp_path / "outside").exists()
    assert not any(Store.of_run(place).root.glob("*")) if Store.of_run(place).root.exists() else True
    assert fetched(remote, place, 100)[0] == 100, "an older one is whole"


class Unreliable(Remote):
    """Fails at the first calls of each operation, in the middle of it."""

    def __init__(self, remote: Remote, failures: int) -> None:
        super().__init__(remote.url)
        self.left = {"write": failures, "read": failures}

    def _fails(self, name: str) -> bool:
        self.left[name] -= 1
        return self.left[name] >= 0

    def writing(self, name: str) -> Any:
        """A file that breaks off after its first bytes."""
        context = super().writing(name)
        if not self._fails("write"):
            return context
        with context as file:
            file.write(b"half")
            raise ConnectionError("reset by peer")

    def chunks(self, name: str) -> Iterator[bytes]:
        """Breaks off likewise."""
        for chunk in super().chunks(name):
            yield chunk
            if self._fails("read"):
                raise ConnectionError("reset by peer")


def test_a_store_that_fails(store: Store, remote: Remote, tmp_path: Path) -> None:
    """A call ends with the store's error, whatever was half-sent is not there, and a later call completes it."""
    commit(store, 100)
    bad = Unreliable(remote, 0)
    for _ in range(3):
        bad.left["write"] = 1
        with pytest.raises(ConnectionError):
            bring(store, bad, streams=1)
        assert steps(remote) == [] and not any(
            size == 4 for name in remote.folders() for size in remote.sizes(name).values()
        )
    assert bring(store, bad) == [100]
    bad.left["read"] = 3
    assert fetched(bad, tmp_path / "new")[0] == 100, "reads are tried again"
    bad.left["read"] = 1000
    with pytest.raises(CheckpointError, match="cannot be read: ConnectionError"):
        fetched(bad, tmp_path / "other")


def test_fetch_says_what_is_there(store: Store, remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint") as failed:
        fetched(remote, tmp_path / "new")
    assert "checkpoint.mirror" in (failed.value.remedy or "")
    commit(store, 100)
    bring(store, remote)
    with pytest.raises(CheckpointError, match="of step 7") as failed:
        fetched(remote, tmp_path / "new", 7)
    assert "100" in (failed.value.remedy or "")


def test_fetch_makes_a_run(store: Store, remote: Remote, tmp_path: Path) -> None:
    """With its configuration, under its new name; the next attempt has a higher number; other checkpoints refuse it."""
    commit(store, 100, attempt=3)
    commit(store, 200, attempt=3)
    bring(store, remote)
    run = tmp_path / "cluster" / "two"
    done = mirrors.fetch(remote.url, None, run)
    assert [one["step"] for one in done["fetched"]] == [200]
    assert next_attempt(run) == 4 and "name: two" in (run / "config.yaml").read_text()
    assert mirrors.fetch(remote.url, None, run)["fetched"][0]["step"] == 200, "again: it is there"
    mirrors.fetch(remote.url, 100, run)
    assert (
        Store.of_run(run).steps() == [100, 200] and (Store.of_run(run).root / "latest").read_text() == "step_00000200\n"
    )
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        mirrors.fetch(remote.url, None, run)


def test_a_full_disk_is_said(store: Store, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, 100)
    bring(store, remote)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_fetch", full)
    with pytest.raises(CheckpointError, match="No space left") as failed:
        fetched(remote, tmp_path / "new")
    assert "make room" in (failed.value.remedy or "")
