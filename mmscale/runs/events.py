"""events.jsonl: the events of a run. The trainer and the launcher write it; status and reports read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmscale.runs.json_lines import as_json, line_of, read_lines
from mmscale.runtime.disk_writer import Appended, DiskWriter

EVENTS = "events.jsonl"
CUT_SHORT = "evaluation_cut_short"  # name of an event with the step
EARLY = "ended_early"  # event of an attempt ended by train.stop_when
BEGINS = ("start", "resume")  # events of an attempt whose steps begin
ORDERLY_ENDS = ("finish", "stop", EARLY)  # events of an attempt that saved its last step: no work is lost
# Events that need no attention.
ROUTINE = (
    *("launch", *BEGINS, "save_begin", "save_committed", "ranks_ended", "profile"),
    *("data_verified", "mirror_uploaded", CUT_SHORT, *ORDERLY_ENDS),
)


class EventLog:
    """events.jsonl: start, resume, save_begin, save_committed, fault, rollback, skip, stop, finish.

    Args:
        run_dir: The run's folder; made if it is missing.
        attempt: Number of this attempt, from `next_attempt`.
        may_write: Called before every line; raises if this process must not write any more.
        writer: Writes the file, and is closed by its owner; default: a new one, whose outages are events here.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        *,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        self.attempt = attempt
        self.writer = writer or DiskWriter(str(run_dir), on_change=self.add)
        self._owned = writer is None
        self._lines = Appended(run_dir / EVENTS, self.writer, may_write=may_write)
        self._lines.touch()

    def add(self, event: str, **fields: Any) -> None:
        """Append one event with the time [seconds since 1970] and the given fields."""
        plain = {key: as_json(value) for key, value in fields.items()}
        self._lines.append(line_of({"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **plain}))

    def close(self) -> None:
        """Write the remaining lines."""
        if self._owned:
            self.writer.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events in the order they were written."""
    return [event for event in read_lines(run_dir / EVENTS) if "event" in event and "time" in event]
