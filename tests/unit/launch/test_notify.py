"""The command that is told of a run's events: what it is told, and that it never holds anything up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch import notify
from launch.notify import Notifier, NotifyingLog, kind_of
from launch.policy import Action
from mmscale.runs.events import read_events
from mmscale.runtime import disk_writer
from mmscale.runtime.disk_writer import DiskWriter

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("launch", {}, "start"),
    ("hang", {}, "fault"),
    ("not_begun", {}, "fault"),
    ("preflight_failed", {}, "fault"),
    ("gave_up", {}, "give_up"),
    ("not_requeued", {}, "stop"),
    ("save_committed", {}, ""),
    ("handed_over", {}, ""),
    ("ranks_ended", {"action": Action.END, "status": 0}, "finish"),
    ("ranks_ended", {"action": Action.END, "status": 75}, "stop"),
    ("ranks_ended", {"action": Action.END, "status": 137, "unsaved": True}, "fault"),
    ("ranks_ended", {"action": Action.REQUEUE, "status": 137, "unsaved": True}, "requeue"),
    ("ranks_ended", {"action": Action.RETRY, "status": 137}, "fault"),
    ("ranks_ended", {"action": Action.REQUEUE, "status": 75}, "requeue"),
    ("ranks_ended", {"action": Action.GIVE_UP, "status": 137}, ""),  # the event gave_up follows
    *(("ranks_ended", {"action": Action.END, "status": status}, "give_up") for status in (2, 3, 4, 5)),
]


@pytest.mark.parametrize(("event", "fields", "kind"), CASES, ids=lambda value: str(value))
def test_kinds(event: str, fields: dict[str, Any], kind: str) -> None:
    assert kind_of(event, fields) == kind
    assert kind in ("", *notify.KINDS)


def notifier(folder: Path, command: str | None, **secrets: str) -> Notifier:
    facts, writer = {"run": "runs/a", "job": "7"}, DiskWriter(str(folder), say=None)
    return Notifier(command, folder=folder, facts=facts, secrets=lambda: secrets, writer=writer)


def test_facts_come_as_json_and_as_variables(tmp_path: Path) -> None:
    told = notifier(
        tmp_path, f'cat > {tmp_path}/told; echo "$MMSCALE_KIND $MMSCALE_RUN $HOOK" > {tmp_path}/env', HOOK="s"
    )
    log = NotifyingLog(tmp_path, 3, notifier=told)
    log.add("gave_up", why='it\'s "quoted" $(touch pwned)', status=5)
    told.finish()
    facts = json.loads((tmp_path / "told").read_text())
    assert facts["time"] > 0
    wanted = {"kind": "give_up", "run": "runs/a", "job": "7", "attempt": 3, "why": 'it\'s "quoted" $(touch pwned)'}
    assert facts.items() >= wanted.items()
    assert (tmp_path / "env").read_text() == "give_up runs/a s\n"
    assert [event["event"] for event in read_events(tmp_path)] == ["gave_up"]
    assert not list(tmp_path.glob(".notify*"))


def test_a_command_that_hangs_is_killed_with_its_children_and_is_not_waited_for(tmp_path: Path) -> None:
    slow = notifier(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait")
    began = time.monotonic()
    for _ in range(3):
        slow.notify("launch", {})
    assert time.monotonic() - began < 300  # not the 600 s of the sleep
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    slow.finish(within_s=0.1)
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "killed" in (tmp_path / notify.LOG).read_text()


def test_a_command_that_hangs_ends_by_itself_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_TIMEOUT_S", 0.2)
    slow = notifier(tmp_path, "sleep 600")
    slow.notify("launch", {})
    ((process, _),) = slow._running
    assert process.wait(300) == 124


def test_nothing_that_goes_wrong_reaches_the_run(tmp_path: Path) -> None:
    def no_secrets() -> dict[str, str]:
        raise OSError

    for broken in (
        notifier(tmp_path, "exit 3"),
        notifier(tmp_path, "no-such-command"),
        notifier(tmp_path / "no such folder", "true"),
        Notifier("true", folder=tmp_path, facts={}, secrets=no_secrets, writer=DiskWriter("x")),
        notifier(tmp_path, None),
    ):
        broken.notify("launch", {"nodes": object()})
        broken.finish()
    assert "no-such-command" in (tmp_path / notify.LOG).read_text()


def test_what_the_command_prints_is_kept_in_order_and_in_part(tmp_path: Path) -> None:
    said = notifier(tmp_path, 'echo "said $MMSCALE_EVENT"; seq 100000 >&2; printf end')
    for event in ("launch", "hang"):
        said.notify(event, {})
        said.finish()
    text = (tmp_path / notify.LOG).read_text()
    assert text.count("100000\nend\n") == 2 and len(text) <= 2 * (notify._MOST_BYTES + 1)


def test_a_folder_that_refuses_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs and is told all; its output waits for the disk with the other records of the job."""
    monkeypatch.setattr(disk_writer, "WAIT_S", 1.0)
    monkeypatch.setattr(disk_writer, "CLOSE_S", 300.0)
    (tmp_path / "launch").write_text("a file where the folder should be")
    began = time.monotonic()
    told = notifier(tmp_path / "launch", f"cat > {tmp_path}/told; echo said")
    told.notify("launch", {"attempt": 1})
    told.finish()
    assert json.loads((tmp_path / "told").read_text())["kind"] == "start"
    assert time.monotonic() - began < 60
    (tmp_path / "launch").unlink()
    assert told._log.writer.close() == 0
    assert (tmp_path / "launch" / notify.LOG).read_text() == "said\n"
