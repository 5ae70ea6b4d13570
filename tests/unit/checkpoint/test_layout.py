"""Folders of checkpoints: committed or not there, the newest one, retention, what a killed attempt leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity, manager
from mmscale.checkpoint.layout import INFO, INFO_FORMAT, LATEST, Store, info_text
from mmscale.checkpoint.save_settings import Retention
from mmscale.errors import CheckpointError
from mmscale.runs.events import EventLog, read_events
from mmscale.train.scratch import start_from_scratch


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.of_run(tmp_path)


def commit(
    store: Store, step: int, *, attempt: int = 1, text: str = "weights", info: dict[str, Any] | None = None
) -> Path:
    folder = store.begin(step, attempt)
    (folder / "sub").mkdir()
    (folder / "sub" / "__0_0.distcp").write_text(text)
    (store.temporary(step, attempt) / INFO).write_text(info_text({"step": step, **(info or {})}))
    files = integrity.digests(folder, integrity.sizes(folder))
    return store.commit(integrity.CheckpointManifest(step, attempt, "digest", "0.1.0", {"world_size": 1}, files))


def folders(store: Store) -> list[str]:
    """What stands beside `latest`."""
    return sorted(entry.name for entry in store.root.iterdir() if entry.name != LATEST)


def test_a_committed_folder_has_its_name_and_what_it_was_told(store: Store, tmp_path: Path) -> None:
    final = commit(store, 100)
    assert final == tmp_path / "checkpoints" / "step_00000100"
    assert store.info(100) == {"step": 100, "format": INFO_FORMAT}
    assert integrity.verify(final, step=100) == []
    assert (store.root / LATEST).read_text() == "step_00000100\n"
    assert (final / "sub" / "__0_0.distcp").read_text() == "weights"
    assert folders(store) == ["step_00000100"]


def test_nothing_counts_before_it_is_committed(store: Store) -> None:
    assert store.steps() == []
    store.begin(5, 1)
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        store.choose()


def test_steps_are_numbers_and_strangers_are_left_alone(store: Store) -> None:
    for step in (9, 10, 123_456_789):
        commit(store, step)
    for name in ("notes.txt", "step_00000007.bak", "step_12", "best"):
        (store.root / name).mkdir()
    (store.root / "step_00000008").write_text("a file, not a folder")
    assert store.steps() == [9, 10, 123_456_789]
    store.sweep()
    assert store.prune(1, verified=store.steps()) == [9]
    assert folders(store) == sorted(
        ["notes.txt", "step_00000007.bak", "step_12", "best", "step_00000008", "step_00000010", "step_123456789"]
    )


def test_choose(store: Store) -> None:
    for step in (10, 30, 20):
        commit(store, step)
    assert store.choose() == 30
    assert store.choose(20) == 20
    with pytest.raises(CheckpointError, match="no checkpoint of step 25") as raised:
        store.choose(25)
    assert "10, 20, 30" in raised.value.remedy


@pytest.mark.parametrize(
    ("keep", "every", "verified", "kept"),
    [
        (3, 0, {30, 40, 50}, {30, 40, 50}),
        (9, 0, {40, 50}, {10, 20, 30, 40, 50}),
        (1, 0, {40, 50}, {40, 50}),  # one is not enough: it may turn out to be damaged
        (1, 0, {20, 50}, {20, 50}),  # nobody knows whether 30 and 40 are whole
        (2, 0, {10, 20}, {10, 20, 40, 50}),
        (1, 20, {40, 50}, {20, 40, 50}),
        (1, 0, {50}, {10, 20, 30, 40, 50}),
        (1, 0, set(), {10, 20, 30, 40, 50}),
        (1, 0, {50, 70}, {10, 20, 30, 40, 50}),  # 70 is no longer there
    ],
)
def test_retention(store: Store, keep: int, every: int, verified: set[int], kept: set[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(store, step)
    assert (
        set(store.prune(keep, permanent=Retention(keep, every).keeps, verified=verified)) == {10, 20, 30, 40, 50} - kept
    )
    assert set(store.steps()) == kept
    assert folders(store) == [store.path(step).name for step in sorted(kept)]


@pytest.mark.parametrize(
    ("early", "every", "kept"),
    [(0, 0, {9, 10}), (1, 0, {1, 9, 10}), (7, 0, {1, 2, 4, 9, 10}), (8, 5, {1, 2, 4, 5, 8, 9, 10})],
)
def test_early_checkpoints_stay(store: Store, early: int, every: int, kept: set[int]) -> None:
    steps = range(1, 11)
    for step in steps:
        commit(store, step)
    retention = Retention(1, every, early)
    assert {step for step in steps if retention.is_early(step)} == {step for step in (1, 2, 4, 8) if step <= early}
    store.prune(1, permanent=retention.keeps, verified=store.steps())
    assert set(store.steps()) == kept


def test_the_best_checkpoint_stays_as_long_as_the_newest_one_names_it(store: Store) -> None:
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        commit(store, step, info={"best": {"metric": "eval/loss", "step": best, "value": 1.0}})
    assert store.best() == 20
    assert store.prune(2, verified=store.steps(), spared=[20]) == [10, 30]
    commit(store, 60)
    assert store.best() is None
    commit(store, 70, info={"best": {"step": 65}})  # its save failed
    assert store.best() is None
    commit(store, 80, info={"best": ["?"]})
    assert store.best() is None


def test_a_step_that_is_done_again_replaces_its_checkpoint(store: Store) -> None:
    commit(store, 10, text="first")
    final = commit(store, 10, attempt=2, text="second")
    assert (final / "sub" / "__0_0.distcp").read_text() == "second"
    assert folders(store) == ["step_00000010"]


def test_begin_empties_what_the_same_attempt_left(store: Store) -> None:
    (store.begin(10, 1) / "old").write_text("")
    assert list(store.begin(10, 1).iterdir()) == []


def test_sweep_deletes_what_was_not_finished_and_nothing_else(store: Store) -> None:
    commit(store, 10)
    for name in ("step_00000020.tmp.1", "step_00000005.deleted", "step_00000010.old.3"):
        (store.root / name / "sub").mkdir(parents=True)
    store.sweep()
    assert folders(store) == ["step_00000010"]


def test_sweep_and_steps_of_a_run_that_never_saved(store: Store) -> None:
    store.sweep()
    assert store.steps() == []


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("call", range(4))
def test_killed_at_any_rename_leaves_the_old_or_the_new_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Before and after every rename of a commit over an existing step, of which one survives a sweep."""
    commit(store, 5, text="older")
    commit(store, 10, text="first")
    rename, calls = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal calls
        if calls == call:
            raise KilledError
        calls += 1
        rename(source, target)
        if calls == call:
            raise KilledError

    monkeypatch.setattr(os, "replace", dying)  # what Path.replace calls
    with contextlib.suppress(KilledError):
        commit(store, 10, attempt=2, text="second")
    monkeypatch.undo()
    Store(store.root).sweep()
    newest = store.choose()
    text = (store.path(newest) / "sub" / "__0_0.distcp").read_text()
    assert (newest, text) in [(10, "first"), (10, "second")]
    assert store.info(newest)["step"] == newest
    assert integrity.verify(store.path(newest), step=newest) == []


def test_a_damaged_information_file_is_named(store: Store) -> None:
    final = commit(store, 10)
    (final / INFO).write_text(json.dumps({"step": 10})[:-3])
    with pytest.raises(CheckpointError, match=INFO):
        store.info(10)


@pytest.mark.parametrize("content", [None, "", "step_00000010\n", "garbage", "step_00000099\n", b"\xff\xfe", "link"])
def test_latest_is_a_hint_that_is_put_right(store: Store, content: str | bytes | None) -> None:
    for step in (10, 20):
        commit(store, step)
    latest = store.root / LATEST
    latest.unlink()
    if content == "link":
        latest.symlink_to(store.path(10))
    elif isinstance(content, bytes):
        latest.write_bytes(content)
    elif content is not None:
        latest.write_text(content)
    assert store.choose() == 20  # nobody reads it
    store.point_to_newest()
    assert latest.read_text() == "step_00000020\n" and not latest.is_symlink()
    assert folders(store) == ["step_00000010", "step_00000020"]


def test_a_condemned_checkpoint_is_kept_aside(store: Store) -> None:
    for step in (10, 20):
        commit(store, step)
    assert store.quarantine(20).name == "step_00000020.bad"
    assert (store.root / LATEST).read_text() == "step_00000010\n"
    commit(store, 20, attempt=2)
    assert store.quarantine(20).name == "step_00000020.bad.2"
    assert store.steps() == [10] and store.newest() == 10
    store.sweep()
    store.prune(1, verified=store.steps())
    assert store.quarantined() == ["step_00000020.bad", "step_00000020.bad.2"]


def test_only_condemned_checkpoints_are_no_reason_to_start_anew(store: Store) -> None:
    assert store.newest() is None
    commit(store, 10)
    store.quarantine(10)
    assert not (store.root / LATEST).exists()
    with pytest.raises(CheckpointError, match=r"step_00000010\.bad") as raised:
        store.newest()
    assert raised.value.exit_status == 4


def test_nothing_is_committed_that_everyone_may_write(store: Store) -> None:
    before = os.umask(0)
    try:
        final = commit(store, 10)
    finally:
        os.umask(before)
    for path in (store.root, final, *final.rglob("*")):
        assert path.stat().st_mode & 0o002 == 0, path


class TestLostCheckpoints:
    """A run that saved and has no checkpoint does not start at step 0 by itself."""

    def saved(self, run: Path) -> Store:
        (run / "checkpoints").mkdir(parents=True)
        events = EventLog(run, 1)
        events.add("save_committed", step=7)
        events.close()
        return Store.of_run(run)

    def test_a_new_run_misses_nothing(self, tmp_path: Path) -> None:
        assert Store.of_run(tmp_path).newest() is None
        (tmp_path / "checkpoints").mkdir()
        EventLog(tmp_path, 1).add("start", step=0)
        assert Store.of_run(tmp_path).newest() is None
        start_from_scratch(tmp_path)
        assert [event["event"] for event in read_events(tmp_path)] == ["start"]

    def test_events_know_of_a_save(self, tmp_path: Path) -> None:
        store = self.saved(tmp_path)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"says that step 7 was saved.*--from-scratch") as error:
                store.newest()
            assert error.value.exit_status == 4
            shutil.rmtree(store.root, ignore_errors=True)  # the whole folder is gone

    def test_latest_knows_of_a_save(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/latest").write_text("step_00000004\n")
        with pytest.raises(CheckpointError, match="latest names 'step_00000004'"):
            Store.of_run(tmp_path).newest()

    def test_a_link_to_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
        for action in (Store.of_run(tmp_path).newest, lambda: start_from_scratch(tmp_path)):
            with pytest.raises(CheckpointError, match=r"is a link to .*scratch, which is not there"):
                action()

    def test_a_commit_that_was_interrupted_is_no_loss(self, tmp_path: Path) -> None:
        store = self.saved(tmp_path)
        (store.root / "step_00000007.old.1").mkdir()
        assert store.newest() is None
        store.sweep()
        assert store.newest() == 7

    def test_from_scratch_is_noted_and_later_saves_count(self, tmp_path: Path) -> None:
        store = self.saved(tmp_path)
        (store.root / "latest").write_text("step_00000007\n")
        start_from_scratch(tmp_path)
        assert store.newest() is None
        assert read_events(tmp_path)[-1]["event"] == "from_scratch"
        start_from_scratch(tmp_path)
        assert len(read_events(tmp_path)) == 2
        events = EventLog(tmp_path, 2)
        events.add("save_committed", step=9)
        events.close()
        with pytest.raises(CheckpointError, match="step 9 was saved"):
            store.newest()

    def test_from_scratch_deletes_nothing(self, tmp_path: Path) -> None:
        store = self.saved(tmp_path)
        store.path(7).mkdir()
        with pytest.raises(CheckpointError, match=r"holds checkpoints \(7\), and --from-scratch deletes none"):
            start_from_scratch(tmp_path)


def test_a_folder_that_was_set_aside_gets_its_name_back(tmp_path: Path) -> None:
    store = Store.of_run(tmp_path)
    store.path(3).mkdir(parents=True)
    bad = store.quarantine(3)
    assert store.restore_bad(bad.name) == 3 and store.newest() == 3 and store.quarantined() == []
    store.quarantine(3)
    store.path(3).mkdir()
    with pytest.raises(CheckpointError, match="cannot take its place"):
        store.restore_bad("step_00000003.bad")


def test_a_topology_from_before_context_parallelism_equals_that_of_the_same_ranks(tmp_path: Path) -> None:
    """Its random states are restored; other ones would change the run."""
    for topology in ({"world_size": 2, "tp": 2}, {"world_size": 2, "tp": 2, "cp": 1}):
        manifest = integrity.CheckpointManifest(1, 1, "", "", topology, {})
        (tmp_path / integrity.MANIFEST).write_text(manifest.text())
        assert manager._topology(tmp_path) == {"world_size": 2, "tp": 2, "cp": 1}
    (tmp_path / integrity.MANIFEST).write_text(integrity.CheckpointManifest(1, 1, "", "", {}, {}).text())
    assert manager._topology(tmp_path) == {}, "of a converted checkpoint, which equals no layout"
