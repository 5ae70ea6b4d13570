"""Writes some figures of logged steps into a CSV file of the run's folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

from mmscale.extend import SinkRun


class CsvSink:
    """The sink.

    Args:
        run: whose figures it gets.
        keys: of metrics.jsonl; one column each.
        file: name of the file.
    """

    on_disk = True  # an OSError of `write` is tried again instead of turning the sink off

    def __init__(self, run: SinkRun, *, keys: Sequence[str] = ("loss", "lr"), file: str = "figures.csv") -> None:
        self.file, self.keys = run.files / file, tuple(keys)
        if not self.file.exists():
            self._append(["attempt", "step", *self.keys])

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Add a row. A line of an evaluation has none of the keys, perhaps."""
        if any(key in values for key in self.keys):
            self._append([attempt, step, *(values.get(key, "") for key in self.keys)])

    def rolled_back(self) -> None:
        """Steps come again: the later row of a step is the valid one."""

    def close(self) -> None:
        """Nothing is open between two rows."""

    def _append(self, row: Sequence[object]) -> None:
        with self.file.open("a", newline="") as opened:
            csv.writer(opened).writerow(row)
