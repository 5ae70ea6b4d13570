"""Detection of ranks that do not start training.

Detects whether started ranks have begun to train: found each other, and read data and checkpoint. Until then they may
wait for each other in C++ code, which runs no Python signal handlers. job.py decides what follows.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mmscale.runs.events import BEGINS, EVENTS, EventLog, read_events
from mmscale.runtime.rank_env import expand_hostlist

_EVERY_S = 2.0
_PATIENCE_S = 30.0  # after a stop request: time that a rank which imports torch may need to handle it
_WAYS_OUT = (
    "logs of the ranks say what they wait for (`mmscale logs RUN --rank 0`); if they wait for each other, no firewall "
    "may stand between the nodes, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the network"
)


class StartWatch:
    """Watches for the event `start` or `resume` of an attempt.

    Args:
        run: the run's folder.
        attempt: its number; later numbers count too, because agents restart ranks in place as new attempts.
        hint_after_s: time until a hint is recorded [seconds].
    """

    def __init__(self, run: Path, attempt: int, *, hint_after_s: float) -> None:
        self._run = run
        self._attempt = attempt
        self._hint_at = time.monotonic() + hint_after_s
        self._patience_s = min(_PATIENCE_S, hint_after_s)
        self._asked: float | None = None
        self._begun = False
        self._looked, self._size = float("-inf"), -1

    def has_started(self) -> bool:
        """Whether rank 0 has started training."""
        now = time.monotonic()
        if self._begun or now - self._looked < _EVERY_S:
            return self._begun
        self._looked = now
        try:
            size = (self._run / EVENTS).stat().st_size
        except OSError:
            return False
        if size != self._size:
            self._size = size
            events = read_events(self._run)
            mine = (event for event in events if int(event.get("attempt", 0)) >= self._attempt)
            self._begun = any(event["event"] in BEGINS for event in mine)
        return self._begun

    def hint_if_late(self, events: EventLog, *, where: str) -> None:
        """Record a hint, once, if ranks take too long.

        Args:
            events: of the attempt.
            where: rendezvous port of the ranks on the first node.
        """
        if time.monotonic() < self._hint_at or self.has_started():
            return
        self._hint_at = float("inf")
        hosts = expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))
        head = os.environ.get("MASTER_ADDR") or (hosts[0] if hosts else "this machine")
        why = f"no rank has begun; ranks meet at {head}{f':{where}' if where else ''}"
        events.add("not_begun", why=why)
        sys.stderr.write(f"{why}\n  fix: {_WAYS_OUT}\n")

    def ignores_stop(self) -> bool:
        """Whether ranks have not started training although they had enough time since the stop request.

        Called while this job is asked to end.
        """
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        return now - self._asked > self._patience_s and not self.has_started()
