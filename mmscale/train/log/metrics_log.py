# Writes metrics.jsonl and layers.jsonl and passes figures on to sinks. It measures nothing. runs/metrics.py reads them.
"""The run's log of figures.

A disk that refuses or hangs does not stop the run: runtime/disk_writer.py keeps the lines and tries again.
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
    """metrics.jsonl and layers.jsonl, and whatever else takes figures. Rank 0 holds one; other ranks hold none.

    Args:
        run_dir: The run's folder; made if it is missing.
        attempt: Number of this attempt, from `next_attempt`.
        backends: TensorBoard and others that get the figures too.
        may_write: Called before every line; raises if this process must not write any more.
        writer: Does the writing, and is closed by its owner; default: one of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        backends: Backends | None = None,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        self.attempt = attempt
        self.rollback = 0
        self._owned = writer is None
        self._writer = writer or DiskWriter(str(run_dir))
        self._lines = Appended(run_dir / METRICS, self._writer, may_write=may_write)
        self._layers = Appended(run_dir / LAYERS, self._writer, may_write=may_write)
        self._lines.touch()
        self._backends = backends or Backends({})

    def attach(self, backends: Backends) -> None:
        """Hand the figures of coming steps to these back ends too, and close them in the end."""
        self._backends = backends

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append the values of one step. A value that is None was not measured and is left out.

        Held-out values may come in a line of their own with the same step: `read_metrics` puts them together.
        """
        numbers = {key: _number(value) for key, value in values.items() if value is not None}
        self._lines.append(line_of(self._place(step) | {key: as_json(value) for key, value in numbers.items()}))
        shown = {key: value for key, value in numbers.items() if key != "time"}  # back ends have clocks of their own
        self._backends.write(step, shown, attempt=self.attempt)

    def write_layers(self, step: int, layers: Mapping[str, Any]) -> None:
        """Append the figures of layers, counted from 0, to layers.jsonl; read back by `report.layers.layers_of`."""
        self._layers.append(line_of(self._place(step) | {"first_layer": 0, "layers": dict(layers)}))

    def rolled_back(self, number: int) -> None:
        """Steps come again from here on.

        Args:
            number: of the roll-back, counted over the whole run.
        """
        self.rollback = number
        self._backends.rolled_back()

    def close(self) -> None:
        """Write what is left."""
        if self._owned:
            self._writer.close()
        self._backends.close()

    def _place(self, step: int) -> dict[str, Any]:
        place = {"step": step, "attempt": self.attempt}
        return place | {"rollback": self.rollback} if self.rollback else place


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, Integral) else float(value)
