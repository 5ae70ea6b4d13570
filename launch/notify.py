# `notify` of a profile: a command that is told when a run starts, has a fault, stops, gives up or finishes. It never
# holds a run up and never fails one: it runs beside it, and is killed when it takes too long.
"""Notifications by a command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.policy import FINAL
from mmscale.runtime.disk_writer import DiskWriter
from mmscale.train.metrics import EventLog

LOG = "notify.log"  # in the launch folder: what the command prints
_TIMEOUT_S = 30.0
_LAST_S = 5.0  # what a job waits for commands that still run before it ends or is requeued
# Events that are told, and as what; of `ranks_ended` its action decides.
_KINDS = {"launch": "start", "hang": "fault", "not_begun": "fault", "preflight_failed": "fault", "gave_up": "give_up"}
_KINDS |= {"not_requeued": "stop"}
_ACTIONS = {"retry": "fault", "requeue": "requeue", "end": "stop"}
KINDS = ("start", "fault", "requeue", "stop", "give_up", "finish")


def kind_of(event: str, fields: Mapping[str, Any]) -> str:
    """What a person is told about an event; "" for nothing."""
    if event != "ranks_ended":
        return _KINDS.get(event, "")
    if fields.get("status") == 0:
        return "finish"
    if fields.get("status") in FINAL:
        return "give_up"
    return _ACTIONS.get(str(fields.get("action")), "")


class Notifier:
    """Runs the command of a profile.

    Args:
        command: shell line; None: nothing is ever run.
        folder: of the launch.
        facts: what every notification says: run, job, cluster.
        secrets: more variables of the command.
    """

    def __init__(
        self,
        command: str | None,
        *,
        folder: Path,
        facts: Mapping[str, str],
        secrets: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._command = command
        self._folder = folder
        self._facts = dict(facts)
        self._secrets = secrets
        self._running: list[subprocess.Popen[bytes]] = []

    def tell(self, event: str, fields: Mapping[str, Any]) -> None:
        """Start the command for an event that it is told about: facts as JSON on stdin, the main ones as variables."""
        kind = kind_of(event, fields)
        self._running = [process for process in self._running if process.poll() is None]
        if self._command is None or not kind:
            return
        facts = {"kind": kind, "event": event, "time": round(time.time(), 3), **self._facts, **fields}
        names = ("kind", "event", "run", "job", "cluster", "attempt", "nodes", "status", "why")
        variables = {f"MMSCALE_{name.upper()}": str(facts[name]) for name in names if name in facts}
        with contextlib.suppress(Exception):  # whatever it is, the run goes on
            self._start(json.dumps(facts, default=str) + "\n", {**os.environ, **self._secrets(), **variables})

    def _start(self, text: str, environment: Mapping[str, str]) -> None:
        given = self._folder / f".notify.{os.getpid()}.{len(self._running)}"
        given.write_text(text)
        try:
            with given.open("rb") as facts, (self._folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    ["timeout", "--kill-after=1", f"{_TIMEOUT_S:g}", "bash", "-c", str(self._command)],
                    env=environment,
                    stdin=facts,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            given.unlink()
        self._running.append(process)

    def finish(self, *, within_s: float = _LAST_S) -> None:
        """Wait a little for commands that still run, and kill them with all that they have started."""
        deadline = time.monotonic() + within_s
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                continue
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(OSError), (self._folder / LOG).open("a") as log:
                log.write(f"notify: killed {within_s:g} s after its job had nothing else to do\n")
        self._running = []


class TellingLog(EventLog):
    """events.jsonl, with a command that is told of some events.

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
        """Append one event, and tell the command."""
        super().add(event, **fields)
        self._notifier.tell(event, {"attempt": self.attempt, **fields})
