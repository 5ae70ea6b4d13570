"""Notifications by a command.

`notify` of a profile: a command that runs when a run starts, has a fault, stops, gives up or finishes. It never delays
a run or makes it fail: it runs in parallel and is killed when it takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from launch.policy import FINAL
from mmscale.runs.events import EventLog
from mmscale.runtime.disk_writer import Appended, DiskWriter

LOG = "notify.log"  # in the launch folder: the output of the command
_TIMEOUT_S = 30.0
_LAST_S = 5.0  # time that a job waits for running commands before it ends or is requeued
_MOST_BYTES = 1 << 16  # kept of the output of one command, from its end
# Events that cause a notification, and their kinds; for `ranks_ended` its action decides.
_KINDS = {"launch": "start", "hang": "fault", "not_begun": "fault", "preflight_failed": "fault", "gave_up": "give_up"}
_KINDS |= {"not_requeued": "stop"}
_ACTIONS = {"retry": "fault", "requeue": "requeue", "end": "stop"}
KINDS = ("start", "fault", "requeue", "stop", "give_up", "finish")


def kind_of(event: str, fields: Mapping[str, Any]) -> str:
    """The kind of notification for an event; "" for none."""
    if event != "ranks_ended":
        return _KINDS.get(event, "")
    if fields.get("status") == 0:
        return "finish"
    if fields.get("status") in FINAL:
        return "give_up"
    if fields.get("unsaved") and fields.get("action") == "end":
        return "fault"
    return _ACTIONS.get(str(fields.get("action")), "")


class Notifier:
    """Runs the command of a profile.

    Args:
        command: shell line; None: no command.
        folder: of the launch.
        facts: included in every notification: run, job, cluster.
        secrets: more variables of the command.
        writer: of the job's records; the command's output goes through it.
    """

    def __init__(
        self,
        command: str | None,
        *,
        folder: Path,
        facts: Mapping[str, str],
        secrets: Callable[[], Mapping[str, str]] = dict,
        writer: DiskWriter,
    ) -> None:
        self._command = command
        self._facts = dict(facts)
        self._secrets = secrets
        self._log = Appended(folder / LOG, writer)
        self._running: list[tuple[subprocess.Popen[bytes], BinaryIO]] = []

    def notify(self, event: str, fields: Mapping[str, Any]) -> None:
        """Start the command for an event that it handles: the event as JSON on stdin, its main fields as variables."""
        kind = kind_of(event, fields)
        self._collect()
        if self._command is None or not kind:
            return
        facts = {"kind": kind, "event": event, "time": round(time.time(), 3), **self._facts, **fields}
        names = ("kind", "event", "run", "job", "cluster", "attempt", "nodes", "status", "why")
        variables = {f"MMSCALE_{name.upper()}": str(facts[name]) for name in names if name in facts}
        with contextlib.suppress(Exception):  # whatever fails, the run continues
            self._start(json.dumps(facts, default=str) + "\n", {**os.environ, **self._secrets(), **variables})

    def _start(self, text: str, environment: Mapping[str, str]) -> None:
        # Both in memory: a disk that does not answer must not hold the job up.
        with _in_memory("facts") as facts:
            facts.write(text.encode())
            facts.seek(0)
            said = _in_memory("said")
            process = subprocess.Popen(
                ["timeout", "--kill-after=1", f"{_TIMEOUT_S:g}", "bash", "-c", str(self._command)],
                env=environment,
                stdin=facts,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._running.append((process, said))

    def _collect(self) -> None:
        """Write down what commands that have ended have printed."""
        for process, said in self._running:
            if process.poll() is not None:
                self._write(said)
        self._running = [(process, said) for process, said in self._running if not said.closed]

    def _write(self, said: BinaryIO, *, more: str = "") -> None:
        with said:
            size = said.seek(0, os.SEEK_END)
            said.seek(max(0, size - _MOST_BYTES))
            text = said.read() + more.encode()
        if text:
            self._log.append(text if text.endswith(b"\n") else text + b"\n")

    def finish(self, *, within_s: float = _LAST_S) -> None:
        """Wait briefly for running commands, then kill them with their children."""
        deadline = time.monotonic() + within_s
        for process, said in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                self._write(said)
                continue
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._write(said, more=f"notify: killed {within_s:g} s after its job had nothing else to do\n")
        self._running = []


def _in_memory(name: str) -> BinaryIO:
    return os.fdopen(os.memfd_create(name), "w+b", buffering=0)


class NotifyingLog(EventLog):
    """events.jsonl, which also runs the notification command for some events.

    Args:
        run_dir: as for `EventLog`.
        attempt: as for `EventLog`.
        notifier: runs the command.
        may_write: as for `EventLog`.
        writer: as for `EventLog`.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        *,
        notifier: Notifier,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        super().__init__(run_dir, attempt, may_write=may_write, writer=writer)
        self._notifier = notifier

    def add(self, event: str, **fields: Any) -> None:
        """Append one event and run the command for it."""
        super().add(event, **fields)
        self._notifier.notify(event, {"attempt": self.attempt, **fields})
