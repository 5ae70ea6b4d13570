"""No damaged checkpoint is ever trained from: faults of the disk and of the process, on forked ranks."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint import integrity, tensor_index
from mmscale.checkpoint.integrity import MANIFEST
from mmscale.checkpoint.layout import INFO, LATEST, Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.errors import CheckpointError
from mmscale.runtime import groups as process_groups
from mmscale.runtime import random_state
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_resume import start
from tests.support import distributed

FLIPS = 100


class Weights:
    """The smallest state: a tensor of which every rank holds a part, and counters."""

    def __init__(self, step: int = 0, *, lacking: str = "", elements: int = 4096) -> None:
        self.step = step
        self.lacking = lacking
        rank = torch.distributed.get_rank()
        self.tensor = torch.full((elements,), float(step)) + rank

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        state: dict[str, Any] = {"weight": ShardedTensor.from_rank_offsets("weight", self.tensor, (0, rank, size))}
        if not loading and self.lacking != "progress":
            state["progress"] = {"step": self.step}
        return state

    def restore(self, loaded: dict[str, Any]) -> None:
        self.step = loaded["progress"]["step"]
        self.tensor = loaded["weight"]

    def is_whole(self) -> bool:
        return bool((self.tensor == self.step + torch.distributed.get_rank()).all())


def manager(
    run: Path, *, attempt: int = 1, **options: Any
) -> tuple[CheckpointManager, list[tuple[str, dict[str, Any]]]]:
    told: list[tuple[str, dict[str, Any]]] = []
    settings: dict[str, Any] = {"every": 1, "keep": 9, "info": {"config_digest": "abc"}, **options}
    made = CheckpointManager(
        run, attempt=attempt, on_event=lambda event, **fields: told.append((event, fields)), **settings
    )
    return made, told


def begin(ranks: RankEnv) -> None:
    start(ranks)
    process_groups.initialize_layout(seed=1)


def save(run: Path, *steps: int, attempt: int = 1, **options: Any) -> CheckpointManager:
    checkpoints, _ = manager(run, attempt=attempt, **options)
    for step in steps:
        checkpoints.save(Weights(step))
    return checkpoints


def on_first(action: Callable[[], object]) -> None:
    """Rank 0 does something to the disk while the others wait."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def zero(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096:8192] = bytes(4096)
    file.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    other.rename(other.with_suffix(".x"))
    one.rename(other)
    other.with_suffix(".x").rename(one)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "block of zeros": lambda f: zero(f / "__0_0.distcp"),
    "swapped files": lambda f: swap(f / "__0_0.distcp", f / "__1_0.distcp"),
    "swapped random states": lambda f: swap(f / "rng/rank_00000.pt", f / "rng/rank_00001.pt"),
    "extra file": lambda f: (f / "__9_0.distcp").write_bytes(b"x"),
    "file of another checkpoint": lambda f: shutil.copy(f.with_name("step_00000001") / "__0_0.distcp", f),
    "everything of another checkpoint": lambda f: (
        shutil.rmtree(f),
        shutil.copytree(f.with_name("step_00000001"), f),
    ),
    **{
        f"{how} {name}": functools.partial(do, name)
        for name in (
            "index.json",
            ".metadata",
            "__1_0.distcp",
            "common.pt",
            "metadata.json",
            INFO,
            MANIFEST,
            "rng/rank_00001.pt",
        )
        for how, do in {
            "truncated": lambda name, f: os.truncate(f / name, (f / name).stat().st_size // 2),
            "deleted": lambda name, f: (f / name).unlink(),
        }.items()
    },
}


@distributed(world_size=2)
def test_damage_is_found_by_all_ranks_and_the_one_before_is_taken(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    save(tmp_path / "run", 1, 2)
    for number, (name, damage) in enumerate(DAMAGE.items()):
        run = tmp_path / f"{number}"
        folder = Store.of_run(run).path(2)
        on_first(lambda run=run: shutil.copytree(tmp_path / "run", run))
        on_first(lambda damage=damage, folder=folder: damage(folder))
        checkpoints, told = manager(run, attempt=2)
        assert checkpoints.choose() == 1, name
        state = Weights()
        checkpoints.load(state, 1)
        assert state.step == 1 and state.is_whole(), name
        assert sorted(entry.name for entry in checkpoints.store.root.iterdir()) == [
            LATEST,
            "step_00000001",
            "step_00000002.bad",
        ]
        assert (checkpoints.store.root / LATEST).read_text() == "step_00000001\n"
        if ranks.rank == 0:
            ((event, fields),) = told
            assert event == "checkpoint_bad" and fields["step"] == 2 and fields["kept_as"] == "step_00000002.bad"
            assert json.dumps(fields["problems"]) != "[]"


@distributed(world_size=2)
def test_100_of_100_flipped_bits_in_every_kind_of_file(ranks: RankEnv, tmp_path: Path) -> None:
    """Hashed by two ranks; the verdict is one."""
    begin(ranks)
    save(tmp_path, 1)
    checkpoints, _ = manager(tmp_path, attempt=2)
    folder, rng = checkpoints.store.path(1), random.Random(5)
    names = [*integrity.sizes(folder), MANIFEST]
    assert (
        len(names) == 10
    )  # index.json, .metadata, two .distcp, common.pt, metadata.json, mmscale.json, two random states, the manifest
    found = 0
    for number in range(FLIPS):
        file = folder / names[number % len(names)]
        before = file.read_bytes()
        on_first(lambda file=file: flip(file, rng))
        found += bool(checkpoints.problems(1))
        on_first(lambda file=file, before=before: file.write_bytes(before))
    assert found == FLIPS
    assert checkpoints.problems(1) == []


@distributed(world_size=2)
def test_all_checkpoints_bad_is_no_start_from_scratch(ranks: RankEnv, tmp_path: Path) -> None:
    """Neither at this start nor at the next one."""
    begin(ranks)
    save(tmp_path, 1, 2)
    on_first(lambda: [zero(Store.of_run(tmp_path).path(step) / "__0_0.distcp") for step in (1, 2)])
    for attempt in (2, 3):
        checkpoints, _ = manager(tmp_path, attempt=attempt)
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole") as raised:
            checkpoints.choose()
        assert raised.value.exit_status == 4
    assert checkpoints.store.quarantined() == ["step_00000001.bad", "step_00000002.bad"]
    assert manager(tmp_path / "new")[0].choose() is None  # a new run is something else


@distributed(world_size=2)
def test_errors_of_the_storage_rename_nothing(ranks: RankEnv, tmp_path: Path) -> None:
    """A stale handle on one rank, a node without the mount, a page of memory that is wrong on one rank alone."""
    begin(ranks)
    save(tmp_path, 1, 2)
    integrity.PAUSES_S = (0.0, 0.0)
    real = integrity.digest

    def stale(path: Path) -> integrity.FileRecord:
        raise OSError(errno.ESTALE, "Stale file handle")

    def unmounted(path: Path) -> integrity.FileRecord:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def wrong(path: Path) -> integrity.FileRecord:
        return replace(real(path), digest="0" * 32)

    cases = {"cannot be read": stale, "is not there on": unmounted, "ranks disagree": wrong}
    for number, (said, broken) in enumerate(cases.items()):
        integrity.digest = broken if ranks.rank == 1 else real
        with pytest.raises(CheckpointError, match=said) as raised:
            manager(tmp_path, attempt=2 + number)[0].choose()
        assert raised.value.remedy and raised.value.exit_status == 4
        assert Store.of_run(tmp_path).steps() == [1, 2] and Store.of_run(tmp_path).quarantined() == []
    integrity.digest = real
    assert manager(tmp_path, attempt=9)[0].choose() == 2


@distributed(world_size=2)
def test_latest_is_never_believed(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    save(tmp_path, 1, 2)
    latest = Store.of_run(tmp_path).root / LATEST
    for content in (None, "", "step_00000001\n", "garbage", "step_00000099\n"):
        on_first(lambda content=content: latest.unlink() if content is None else latest.write_text(content))
        assert manager(tmp_path, attempt=2)[0].choose() == 2
        assert latest.read_text() == "step_00000002\n"


def rewrite_manifest(folder: Path) -> None:
    """As another program would that writes valid checkpoints without something."""
    manifest = integrity.read_manifest(folder)
    files = integrity.digests(folder, integrity.sizes(folder))
    (folder / MANIFEST).write_text(replace(manifest, files=files).text())


def without_manifest(folder: Path) -> None:
    """A checkpoint of the time before manifests."""
    (folder / MANIFEST).unlink()
    info = json.loads((folder / INFO).read_text())
    del info["format"]
    (folder / INFO).write_text(json.dumps(info))


@distributed(world_size=2)
def test_a_missing_item_is_refused_unless_allowed(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    store = Store.of_run(tmp_path)
    checkpoints, _ = manager(tmp_path)
    checkpoints.save(Weights(1, lacking="progress"))
    checkpoints.save(Weights(2))
    on_first(lambda: (store.path(2) / "rng/rank_00001.pt").unlink())
    on_first(lambda: rewrite_manifest(store.path(2)))
    checkpoints.save(Weights(3))
    on_first(lambda: without_manifest(store.path(3)))
    for step, lacks in ((1, "counters"), (2, "random state of 1 of 2 ranks"), (3, MANIFEST)):
        with pytest.raises(CheckpointError, match=lacks) as raised:
            manager(tmp_path, attempt=2)[0].load(Weights(), step)
        assert "checkpoint.allow_missing=true" in raised.value.remedy and raised.value.exit_status == 4
        allowed, told = manager(tmp_path, attempt=2, allow_missing=True)
        state = Weights()
        allowed.load(state, step)
        assert state.step == step and state.is_whole()
        expected = {1: [], 2: ["random_state_fresh"], 3: ["checkpoint_unverified", "random_state_fresh"]}[step]
        assert [event for event, _ in told] == (expected if ranks.rank == 0 else [])
    with pytest.raises(CheckpointError, match=MANIFEST):
        manager(tmp_path, attempt=2)[0].choose()  # not renamed: it is old, not damaged
    assert store.steps() == [1, 2, 3]


class Touches:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


@distributed(world_size=2)
def test_hostile_pickles_do_not_run(ranks: RankEnv, tmp_path: Path) -> None:
    """With a manifest that fits: in the index, in the common part, among the entries that are no tensors."""
    begin(ranks)
    save(tmp_path, 1)
    marker, folder = tmp_path / "marker", Store.of_run(tmp_path).path(1)
    whole = {name: (folder / name).read_bytes() for name in (".metadata", "common.pt", "rng/rank_00000.pt")}
    metadata = pickle.loads(whole[".metadata"])
    metadata.planner_data = Touches(marker)
    hostile: dict[str, Callable[[], object]] = {
        ".metadata": lambda: (folder / ".metadata").write_bytes(pickle.dumps(metadata)),
        "common.pt": lambda: torch.save({"progress": Touches(marker)}, folder / "common.pt"),
        "rng/rank_00000.pt": lambda: torch.save({"python": Touches(marker)}, folder / "rng/rank_00000.pt"),
    }
    on_first(lambda: (hostile[".metadata"](), rewrite_manifest(folder)))
    manager(tmp_path, attempt=2)[0].load(Weights(), 1)  # index.json is beside it, so nobody opens it
    assert not marker.exists()
    on_first((folder / "index.json").unlink)  # as in a checkpoint of an older version
    for name, write in hostile.items():
        on_first(lambda write=write: (write(), rewrite_manifest(folder)))
        checkpoints, _ = manager(tmp_path, attempt=2)
        assert checkpoints.problems(1) == []
        with pytest.raises(CheckpointError) as raised:
            checkpoints.load(Weights(), 1)
        assert raised.value.exit_status == 4 and not marker.exists(), name
        on_first(lambda name=name: (folder / name).write_bytes(whole[name]))
    on_first(lambda: rewrite_manifest(folder))
    state = Weights()
    manager(tmp_path, attempt=2)[0].load(state, 1)
    assert state.is_whole()
    on_first(lambda: folder.chmod(0o777))
    with pytest.raises(CheckpointError, match="can be written by every user"):
        manager(tmp_path, attempt=2)[0].load(Weights(), 1)


@distributed(world_size=2)
def test_the_index_is_read_once(ranks: RankEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Weights):
        def expect(self, stored: Any) -> None:
            assert set(stored) == {"weight"}

    begin(ranks)
    save(tmp_path, 1)
    checkpoints, _ = manager(tmp_path, attempt=2)
    reads: list[Path] = []
    read = tensor_index.read
    monkeypatch.setattr(tensor_index, "read", lambda folder: (reads.append(folder), read(folder))[1])
    checkpoints.load(Told(), 1)
    assert reads == [Store.of_run(tmp_path).path(1)]


def draws() -> list[Tensor]:
    """A number from every source of this rank."""
    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3)
    return [tracked, torch.rand(3), torch.tensor(random.random()), torch.from_numpy(np.random.rand(3))]


@distributed(world_size=2)
def test_every_rank_goes_on_with_its_own_random_numbers(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    random_state.device.set_seeds(100 + ranks.rank)  # as different as augmentation makes them
    draws()
    save(tmp_path, 1)
    expected = draws()
    process_groups.destroy_layout()
    process_groups.initialize_layout(seed=77)
    checkpoints, told = manager(tmp_path, attempt=2, seed=5)
    checkpoints.load(Weights(), 1)
    assert all(map(torch.equal, draws(), expected)) and told == []
    process_groups.destroy_layout()
    process_groups.initialize_layout(tp=2, seed=77)
    seen = []
    for _ in range(2):
        checkpoints, told = manager(tmp_path, attempt=2, seed=5)
        checkpoints.load(Weights(), 1)
        seen.append(draws())
    assert all(map(torch.equal, *seen)) and not torch.equal(seen[0][1], expected[1])
    if ranks.rank == 0:
        ((event, fields),) = told
        assert event == "random_state_fresh" and fields["saved_topology"]["tp"] == 1 and fields["topology"]["tp"] == 2
