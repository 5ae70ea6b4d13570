# Which rank the others wait for: each one's own time of a logged step, up to where gradients meet.
# Step times say nothing of that: all ranks end a step together. It decides nothing; a person takes a node out.
"""Stragglers.

A rank's own time runs from where it asks its loader for a batch to the end of its last backward pass: its loader, its
computation, and what it waits for within its own replica (tensor, expert and pipeline parallel exchanges), but not for
other replicas, also where gradients are reduced while backward runs. So a slow rank shows as itself where ranks are
replicas, and with its replica otherwise. Where parameters are gathered during forward (parallel.overlap_param_gather)
each rank's forward waits for the last one to get there: only what is slow after that shows as its own.

On a device both ends are marks in its queue, read when the step has been waited for anyway. What is left of the step
before, its update, is short and comes before the first mark; from then on the queue is empty until the batch is there,
so the loader's time lies between the marks. Measured on logged steps alone, and by nobody where there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mmscale.config import Config
from mmscale.data.loader import StepBatch
from mmscale.runtime import device
from mmscale.train.loop import StepReport, is_logged
from mmscale.train.state import StageState
from mmscale.train.step import Steps


class RankTimes:
    """Measures this rank and compares it with the others; a hook that goes before the one that writes figures down.

    Args:
        config: which steps are logged.
        stepper: computes; says when gradients are about to be reduced.
        state: says which step begins.
        begun: called with the step that begins: faults are injected there.
    """

    def __init__(self, config: Config, *, stepper: Steps, state: StageState, begun: Callable[[int], None]) -> None:
        self.config = config
        self.state = state
        self._begun = begun
        self._timer = device.Timer()
        self._measuring = False
        self._figures: dict[str, float] = {}
        self._size = torch.distributed.get_world_size()
        if self._size == 1:
            return
        stepper.before_reduction(self._end)

    def watch(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same batches; asking for one begins a step."""
        while True:
            step = self.state.step + 1
            self._measuring = self._size > 1 and is_logged(self.config, step)
            if self._measuring:
                self._timer.begin()
            self._begun(step)
            yield next(batches)

    def _end(self) -> None:
        if self._measuring:
            self._timer.end()
            self._measuring = False  # a step that is computed again is measured once

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Compare the ranks on a logged step; every rank calls it."""
        if self._size == 1 or not is_logged(self.config, report.step):
            return
        mine = torch.tensor([self._timer.seconds() or 0.0], dtype=torch.float64, device=device.taken())
        found = [torch.zeros_like(mine) for _ in range(self._size)]
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
