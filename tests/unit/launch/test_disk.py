"""What a job writes while its disk refuses, and after its run was renamed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from launch import disk as disk_module
from launch.disk import Disk
from launch.policy import Budget
from mmscale.errors import SaveError
from mmscale.runs.events import EventLog, read_events
from mmscale.runtime import disk_writer


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(disk_writer, "RETRY_S", 0.02)
    monkeypatch.setattr(disk_module, "_AGAIN_S", 0.01)
    folder = tmp_path / "run" / "launch" / "001"
    folder.mkdir(parents=True)
    return Disk(tmp_path / "run", folder, give_up=lambda: False)


def test_restarts_count_although_the_disk_refuses_to_note_them(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        disk.keep(Budget(restarts=3, step=7))
        assert disk.budget() == Budget(restarts=3, step=7) and not list(disk.folder.iterdir())
    disk.close()
    assert json.loads((disk.folder / "budget.json").read_text())["restarts"] == 3


def test_what_comes_before_ranks_is_tried_again_for_a_while(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []

    def action() -> int:
        tries.append(1)
        if len(tries) % 4:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return len(tries)

    assert disk.with_retries(action) == 4
    assert capsys.readouterr().err.count("Read-only file system; tried again") == 1
    monkeypatch.setattr(disk_module, "_PATIENCE_S", 0.0)
    with pytest.raises(SaveError, match="cannot be written: Read-only file system") as raised:
        disk.with_retries(action)
    assert raised.value.exit_status == 74 and "mmscale resume" in raised.value.remedy


def test_a_renamed_run_gets_the_last_notes(disk: Disk, tmp_path: Path) -> None:
    events = disk.noted(EventLog(disk.place(), 1, writer=disk.writer))
    (tmp_path / "run").rename(tmp_path / "moved")
    events.add("ranks_ended", status=5)
    disk.keep(Budget(restarts=1))
    disk.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["moved"]
    assert [event["event"] for event in read_events(tmp_path / "moved")] == ["ranks_ended"]
    assert json.loads((tmp_path / "moved" / "launch" / "001" / "budget.json").read_text())["restarts"] == 1
