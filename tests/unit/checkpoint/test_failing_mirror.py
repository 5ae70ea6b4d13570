"""Mirrors in a store that fails to answer: nothing is taken for absent that the store did not call absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import run_folder
from mmscale.checkpoint.integrity import MANIFEST
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror import downloads, worker
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.errors import CheckpointError
from mmscale.runtime import fail_points
from tests.unit.checkpoint.failing_store import FailingStore
from tests.unit.checkpoint.test_mirror import KilledError, bring, commit, fetched, kills, steps

pytestmark = pytest.mark.usefixtures("no_waits")

ERRORS = [PermissionError("403"), OSError("503 slow down"), TimeoutError("no answer"), ConnectionError("reset")]
_BY_NAME = [pytest.param(error, id=type(error).__name__) for error in ERRORS]


@pytest.fixture
def remote() -> Remote:
    FailingStore.reset()
    return Remote("failing://bucket/one")


def lose(store: Store, step: int) -> None:
    """The run deletes one of its own, as its retention does."""
    shutil.rmtree(store.path(step))


@pytest.mark.parametrize("operation", ["info", "ls"])
@pytest.mark.parametrize("error", _BY_NAME)
def test_a_complete_checkpoint_is_not_deleted_because_the_store_fails(
    store: Store, remote: Remote, operation: str, error: Exception
) -> None:
    """One that the mirror alone holds: the store does not say whether its manifest is there."""
    for step in (1000, 1100, 1200):
        commit(store, step)
        bring(store, remote)
    lose(store, 1000)
    before = dict(FailingStore.files)
    FailingStore.fail(operation, error)
    with pytest.raises(type(error)):
        bring(store, remote)
    assert FailingStore.files == before
    FailingStore.failures.clear()
    assert bring(store, remote) == [] and steps(remote) == [1000, 1100, 1200]


@pytest.mark.parametrize("error", _BY_NAME)
def test_a_failed_deletion_is_said_and_done_later(store: Store, remote: Remote, error: Exception) -> None:
    for step in (100, 200):
        commit(store, step)
    bring(store, remote)
    commit(store, 300)
    FailingStore.fail("rm", error, 1)
    with pytest.raises(type(error)):
        bring(store, remote)
    assert steps(remote) == [100, 200, 300]
    bring(store, remote)
    assert steps(remote) == [200, 300]


def test_parts_are_deleted_when_the_store_says_that_they_are_parts(store: Store, remote: Remote) -> None:
    commit(store, 100)
    with pytest.raises(KilledError), fail_points.handled(kills(1)):
        bring(store, remote, streams=1)
    lose(store, 100)
    commit(store, 200)
    bring(store, remote)
    assert steps(remote) == [200] and len(remote.folders()) == 1


@pytest.mark.parametrize("operation", ["info", "ls"])
@pytest.mark.parametrize("error", _BY_NAME)
def test_fetch_takes_no_older_checkpoint_because_the_store_fails(
    store: Store, remote: Remote, tmp_path: Path, operation: str, error: Exception
) -> None:
    for step in (100, 200):
        commit(store, step)
    bring(store, remote)
    FailingStore.fail(operation, error, 3)
    assert fetched(remote, tmp_path / "new")[0] == 200, "it is asked again"
    FailingStore.fail(operation, error)
    with pytest.raises(CheckpointError, match=f"cannot be read: {type(error).__name__}") as failed:
        fetched(remote, tmp_path / "other")
    assert "credentials" in (failed.value.remedy or "")


def test_a_folder_whose_listing_fails_is_not_an_empty_one(store: Store, remote: Remote) -> None:
    commit(store, 100)
    bring(store, remote)
    (name,) = remote.folders()
    assert remote.sizes(name).keys() >= {"random/0", MANIFEST}
    FailingStore.fail("ls", PermissionError("403"))
    with pytest.raises(PermissionError):
        remote.sizes(name)


def test_a_signature_that_cannot_be_read_is_asked_for_again(
    store: Store, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a store that says so has none."""
    commit(store, 100)
    bring(store, remote)
    read_text = remote.read_text

    def fails(name: str) -> str:
        if name.endswith(MANIFEST):
            return read_text(name)
        raise ConnectionError("reset")

    monkeypatch.setattr(remote, "read_text", fails)
    with pytest.raises(CheckpointError, match="cannot be read: ConnectionError"):
        fetched(remote, tmp_path / "new")
    assert downloads.generations(remote) != [] and Store.of_run(tmp_path / "new").steps() == []


def test_a_store_that_cannot_be_reached_is_said_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "hunter2hunter2")

    def away(self: Remote, url: str) -> None:
        raise ConnectionRefusedError("hunter2hunter2")

    monkeypatch.setattr(Remote, "__init__", away)
    with pytest.raises(CheckpointError, match=r"ConnectionRefusedError: \*\*\*;"):
        downloads.connect("ftp://127.0.0.1:1/x")


def test_the_configuration_of_a_stage_names_the_run(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run_folder.write_config(run, {"run": {"dir": "old", "name": "one"}}, folder=run / "auxiliary")
    text = (run / "auxiliary" / "config.yaml").read_text()
    assert "name: new" in text and f"dir: {tmp_path}\n" in text and not (run / "config.yaml").exists()


def test_a_process_whose_store_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise ConnectionRefusedError("refused")

    assert worker._try(away) == "ConnectionRefusedError: refused"
