"""A clock for the training loop, and how it is used.

Measures the speed of a run: tokens per second, the parts of a step's time, model FLOP/s, and MFU if the peak is known.
It measures time on the host and writes nothing; FLOPs per token and peaks come from mmscale.plan.

```
clock = Throughput(flops_per_token=..., world_size=8, peak_tflops=peak_tflops(name, dtype))
with clock.measure("data_wait_s"):
    batch = next(batches)
...
clock.step(tokens)                      # after every optimizer step
with clock.measure("save_stall_s"):
    checkpoints.save(state)
values = clock.read()                   # on logged steps, after the loss has been fetched from the device
```
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from mmscale.tables.gpus import bf16_peak

# Part of a step's time. All other measured times (saving, evaluation) are pauses, which a step's time excludes.
DATA_WAIT = "data_wait_s"
SAVE_STALL = "save_stall_s"
STEP_TIME = "step_time_s"


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak of a device for matrix products [TFLOP/s]; None if it is unknown, in which case no MFU is reported.

    Args:
        device_name: As returned by `runtime.device.device_name()`.
        dtype: precision.dtype. Only bf16 has a definite peak: that of fp32 depends on whether TF32 is allowed.
    """
    peak = bf16_peak(device_name) if dtype == "bf16" else None
    return None if peak is None else peak / 1e12


class Throughput:
    """Counts tokens and seconds between two calls of `read`.

    Args:
        flops_per_token: Model FLOPs of one token, forward and backward, without recomputation; None: unknown.
        world_size: Ranks that share the work.
        peak_tflops: Peak of one rank's device [TFLOP/s]; None: unknown.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        world_size: int = 1,
        peak_tflops: float | None = None,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self.restart()

    def restart(self) -> None:
        """Forget the steps since the last `read`, e.g. after a roll-back."""
        self._since = time.perf_counter()
        self._tokens = 0
        self._steps = 0
        self._seconds = 0.0  # until the end of the last step, without pauses
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Count the seconds of a block under `what`: "data_wait_s", "save_stall_s", or any other pause."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - begin

    def step(self, tokens: int) -> None:
        """One optimizer step is done.

        Args:
            tokens: Tokens of the step over all ranks, padding not counted.
        """
        self._tokens += tokens
        self._steps += 1
        self._seconds = time.perf_counter() - self._since - sum(self._pauses().values())

    def unread(self) -> dict[str, float]:
        """What the next `read` would tell of time, for the event of an end between two logged steps.

        The sums of pauses, and `step_time_s` if there was a step, rounded to milliseconds. What came after the last
        step, other than pauses, is not part of the step time.
        """
        mean = {STEP_TIME: self._seconds / self._steps} if self._steps else {}
        return {what: round(seconds, 3) for what, seconds in (mean | self._pauses()).items()}

    def _pauses(self) -> dict[str, float]:
        return {what: seconds for what, seconds in self._spent.items() if what != DATA_WAIT}

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call, keyed as in metrics.jsonl. Empty if there was no step.

        `save_stall_s` and other pauses are sums and are not part of the step time: frequent saves do not change the
        tokens per second, but lower the goodput.
        """
        pauses = self._pauses()
        seconds = time.perf_counter() - self._since - sum(pauses.values())
        steps, tokens, waited = self._steps, self._tokens, self._spent.get(DATA_WAIT)
        self.restart()
        if steps == 0 or seconds <= 0.0:
            return pauses
        values = {STEP_TIME: seconds / steps, "tokens_per_second": tokens / seconds}
        if waited is not None:
            values[DATA_WAIT] = waited / steps
        if self.flops_per_token is not None:
            tflops = values["tokens_per_second"] * self.flops_per_token / self.world_size / 1e12
            values["model_tflops_per_rank"] = tflops
            if self.peak_tflops is not None:
                values["mfu"] = tflops / self.peak_tflops
        return values | pauses
