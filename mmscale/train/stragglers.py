# Which rank the others wait for: each one's own time of a logged step, up to where gradients meet.
# Step times say nothing of that: all ranks end a step together. It decides nothing; a person takes a node out.
"""Stragglers.

A rank's own time runs from where it asks its loader for a batch to the end of its last backward pass, before gradients
are reduced: its loader, its computation, and what it waits for within its own replica (tensor, expert and pipeline
parallel exchanges), but not for other replicas. So a slow rank shows as itself where ranks are replicas, and with its
replica otherwise.
Measured on logged steps alone: on a device the host has to wait for the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmscale.config import Config
from mmscale.data.loader import StepBatch
from mmscale.runtime import device
from mmscale.train.loop import StepReport, is_logged
from mmscale.train.state import TrainState
from mmscale.train.step import Stepper


class RankTimes:
    """Measures this rank and compares it with the others; a hook that goes before the one that writes figures down.

    Args:
        config: which steps are logged.
        stepper: computes; its way to reduce gradients is wrapped.
        state: says which step begins.
        begun: called with the step that begins: faults are injected there.
    """

    def __init__(self, config: Config, *, stepper: Stepper, state: TrainState, begun: Callable[[int], None]) -> None:
        self.config = config
        self.state = state
        self._begun = begun
        self._begin = 0.0
        self._seconds: float | None = None
        self._figures: dict[str, float] = {}
        transformer = stepper.chunks[0].config
        self._reduce: Callable[..., Any] = transformer.finalize_model_grads_func  # type: ignore[assignment]
        transformer.finalize_model_grads_func = self._finalize

    def watch(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same batches; asking for one begins a step."""
        while True:
            self._begin, self._seconds = time.perf_counter(), None
            self._begun(self.state.step + 1)
            yield next(batches)

    def _finalize(self, *arguments: Any, **more: Any) -> Any:
        if self._seconds is None and is_logged(self.config, self.state.step + 1):
            device.synchronize()
            self._seconds = time.perf_counter() - self._begin
        return self._reduce(*arguments, **more)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        """Compare the ranks on a logged step; every rank calls it."""
        size = torch.distributed.get_world_size()
        if size == 1 or not is_logged(self.config, report.step):
            return
        mine = torch.tensor([self._seconds or 0.0], dtype=torch.float64, device=device.taken())
        found = [torch.zeros_like(mine) for _ in range(size)]
        torch.distributed.all_gather(found, mine)
        self._figures = spread(torch.cat(found).tolist())

    def figures(self) -> dict[str, float]:
        """Of the last logged step, keyed as in metrics.jsonl; nothing for a single rank."""
        return self._figures


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and largest of the ranks' own times, and whose the largest is."""
    ordered = sorted(seconds)
    largest = ordered[-1]
    return {
        "rank_time_median_s": ordered[(len(ordered) - 1) // 2],
        "rank_time_max_s": largest,
        "slowest_rank": float(seconds.index(largest)),
    }
