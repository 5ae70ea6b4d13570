"""The run's log of metrics.

Writes metrics.jsonl and layers.jsonl and passes metrics on to sinks. runs/metrics.py reads the files.

A disk that fails or hangs does not stop the run: runtime/disk_writer.py keeps the lines and tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from mmscale.runs.json_lines import as_json, line_of
from mmscale.runs.metrics import LAYERS, METRICS
from mmscale.runtime.disk_writer import Appended, DiskWriter
from mmscale.train.log.sinks import Backends


class MetricsLog:
    """Writes metrics.jsonl and layers.jsonl, and passes metrics on to sinks. Rank 0 has one; other ranks have none.

    Args:
        run_dir: The run's folder; made if it is missing.
        attempt: Number of this attempt, from `next_attempt`.
        may_write: Called before every line; raises if this process must not write any more.
        writer: Writes the files, and is closed by its owner; default: a new one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        self.attempt, self.folder = attempt, run_dir
        self.rollback = 0
        self._owned = writer is None
        self._writer = writer or DiskWriter(str(run_dir))
        self._lines = Appended(run_dir / METRICS, self._writer, may_write=may_write)
        self._layers = Appended(run_dir / LAYERS, self._writer, may_write=may_write)
        self._lines.touch()
        self._backends = Backends({})

    def attach(self, backends: Backends) -> None:
        """Pass the metrics of later steps to these sinks too, and close them at the end."""
        self._backends = backends

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append the values of one step. A value of None was not measured and is left out.

        Held-out values may be written as another line with the same step; `read_metrics` joins them.
        """
        numbers = {key: _number(value) for key, value in values.items() if value is not None}
        self._lines.append(line_of(self._place(step) | {key: as_json(value) for key, value in numbers.items()}))
        shown = {key: value for key, value in numbers.items() if key != "time"}  # sinks record their own time
        self._backends.write(step, shown, attempt=self.attempt)

    def write_layers(self, step: int, layers: Mapping[str, Any]) -> None:
        """Append the metrics of layers, counted from 0, to layers.jsonl; `report.layers.layers_of` reads them."""
        self._layers.append(line_of(self._place(step) | {"first_layer": 0, "layers": dict(layers)}))

    def rolled_back(self, number: int) -> None:
        """The run was rolled back: later lines repeat steps.

        Args:
            number: of the roll-back, counted over the whole run.
        """
        self.rollback = number
        self._backends.rolled_back()

    def close(self) -> None:
        """Write the remaining lines."""
        if self._owned:
            self._writer.close()
        self._backends.close()

    def _place(self, step: int) -> dict[str, Any]:
        place = {"step": step, "attempt": self.attempt}
        return place | {"rollback": self.rollback} if self.rollback else place


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, Integral) else float(value)
