"""The record of `mmscale bench gpu`: rows written immediately, a time limit, and reasons for missing rows.

A row that fails does not end the others; a killed run keeps what it has measured.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmscale.bench.gpu_shapes import EXPECTED, Ceilings, Shape, predicted
from mmscale.runtime import device, stopwatch


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        number: of the measurement, 1 to 7.
        name: what was timed.
        ms: min, median and max [ms]; None: not measured.
        predicted_ms: predicted beforehand, for one H100.
        floor_ms: time of the device's best product or copy for the same work, as measured in the first rows.
        tflops: of the median [TFLOP/s], by the FLOPs that the model needs.
        note: explanation of the number, or the reason why there is none.
    """

    number: int
    name: str
    ms: tuple[float, float, float] | None
    predicted_ms: float | None = None
    floor_ms: float | None = None
    tflops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class GpuCheck:
    """One comparison of the correctness part; limit is the largest value that passes.

    Attributes:
        name: what was compared.
        value: the difference; None: there is none, because it was not measured or because it failed.
        limit: of the difference.
        passed: None: not measured. Errors and NaN do not pass.
        note: explanation of the value, or the reason why there is none.
    """

    name: str
    value: float | None
    limit: float
    passed: bool | None
    note: str


@dataclass
class Session:
    """Rows and checks of one run.

    Attributes:
        shape: sizes.
        repeats: timed calls of every row.
        deadline: `time.monotonic()` after which no new row begins.
        out: JSON file that is written after every row; None: none.
        ceilings: as measured; until then those expected of an H100.
    """

    shape: Shape
    repeats: int
    deadline: float
    out: Path | None = None
    ceilings: Ceilings = EXPECTED
    rows: list[Row] = field(default_factory=list)
    checks: list[GpuCheck] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """precision.dtype of everything that is timed."""
        return "bf16" if device.has_cuda() else "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as a torch dtype."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def time(
        self,
        number: int,
        name: str,
        prepare: Callable[[], Callable[[int], object]],
        *,
        flops: float | None = None,
        floor: float | None = None,
        key: str | None = None,
        note: str = "",
    ) -> float | None:
        """Time the work that `prepare` returns, and store the row.

        Args:
            number: of the measurement.
            name: of the row.
            prepare: creates the tensors and returns the work.
            flops: of one call.
            floor: seconds; None: flops at the bf16 ceiling.
            key: of the prediction; default: the name.
            note: of the row.

        Returns:
            Median [s]; None: not measured.
        """
        guess = predicted(self.shape).get(key or name)
        if time.monotonic() > self.deadline:
            self.skip(number, name, "no time was left", key=key)
            return None
        try:
            found = stopwatch.seconds(prepare(), repeats=self.repeats, warmup=min(3, self.repeats))
        except Exception as error:  # the other rows must still be measured
            self.skip(number, name, f"{type(error).__name__}: {_first_line(error)}", key=key)
            return None
        finally:
            stopwatch.release()
        median = statistics.median(found)
        if floor is None and flops is not None:
            floor = flops / self.ceilings.bf16
        row = Row(
            number,
            name,
            (min(found) * 1e3, median * 1e3, max(found) * 1e3),
            predicted_ms=_ms(guess),
            floor_ms=_ms(floor),
            tflops=None if flops is None else flops / median / 1e12,
            note=note,
        )
        self._keep(row)
        return median

    def skip(self, number: int, name: str, why: str, *, key: str | None = None) -> None:
        """Store the reason for a missing row."""
        guess = predicted(self.shape).get(key or name)
        self._keep(Row(number, name, None, predicted_ms=_ms(guess), note=f"not measured: {why}"))

    def check(self, name: str, limit: float, compare: Callable[[], tuple[float, str]]) -> None:
        """Compare, and store the result: the difference and its explanation."""
        if time.monotonic() > self.deadline:
            self.leave_out(name, limit, "no time was left")
        else:
            try:
                value, note = compare()
                if math.isfinite(value):
                    self.checks.append(GpuCheck(name, value, limit, bool(value <= limit), note))
                else:
                    self.checks.append(GpuCheck(name, None, limit, False, f"{value}: {note}"))
            except Exception as error:  # as above
                note = f"{type(error).__name__}: {_first_line(error)}"
                self.checks.append(GpuCheck(name, None, limit, False, note))
            finally:
                stopwatch.release()
        self.write()

    def leave_out(self, name: str, limit: float, why: str) -> None:
        """Store the reason for a missing check."""
        self.checks.append(GpuCheck(name, None, limit, None, f"not measured: {why}"))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def result(self) -> dict[str, object]:
        """Everything, as plain data."""
        return {
            "device": device.device_name(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            **self.facts,
            "shape": asdict(self.shape),
            "repeats": self.repeats,
            "ceilings": asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
            "checks": [asdict(check) for check in self.checks],
        }

    def write(self) -> None:
        """Write the results so far to the file."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_finite(self.result()), indent=1, allow_nan=False)
            self.out.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replaces NaN by null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
