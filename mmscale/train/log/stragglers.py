"""Detection of slow ranks.

Finds the rank that the others wait for, from each rank's own time in a logged step up to the gradient reduction. Step
times do not show it, because all ranks end a step together. Excluding a node is left to the user.

A rank's own time runs from the request for a batch to the end of its last backward pass. It includes its loader, its
computation, and waiting within its own replica (tensor, expert and pipeline parallel exchanges), but not waiting for
other replicas, even if gradients are reduced while backward runs. So a slow rank is identified exactly if every replica
is one rank; otherwise its whole replica is. If parameters are gathered during forward (parallel.overlap_param_gather),
each rank's forward waits for the last one to arrive, and only delays after that are attributed to a rank.

On a device both ends are events in its queue, which are read after the step has been waited for anyway. The rest of the
preceding step, its update, is short and is queued before the first event; then the queue is empty until the batch
arrives, so the loader's time lies between the events. Measured on logged steps only, and only with several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mmscale.config import Config
from mmscale.data.stream.loader import StepBatch
from mmscale.runtime import device
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step import Steps
from mmscale.train.steps.step_report import StepReport, is_logged


class RankTimes:
    """Measures this rank and compares it with the others. A hook that must run before the one that writes metrics.

    Args:
        config: which steps are logged.
        stepper: computes; calls back when gradients are about to be reduced.
        state: has the number of the coming step.
        begun: called with the step that begins, for fault injection.
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
        """Yields the same batches; requesting one begins a step."""
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
            self._measuring = False  # a step that is computed twice is measured once

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Compare the ranks on a logged step; every rank calls it."""
        if self._size == 1 or not is_logged(self.config, report.step):
            return
        mine = torch.tensor([self._timer.seconds() or 0.0], dtype=torch.float64, device=device.taken())
        found = [torch.zeros_like(mine) for _ in range(self._size)]
        torch.distributed.all_gather(found, mine)
        self._figures = spread(torch.cat(found).tolist())

    def figures(self) -> dict[str, float]:
        """Metrics of the last logged step, keyed as in metrics.jsonl; empty for a single rank."""
        return self._figures


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and largest of the ranks' own times, and the rank with the largest."""
    ordered = sorted(seconds)
    largest = ordered[-1]
    return {
        "rank_time_median_s": ordered[(len(ordered) - 1) // 2],
        "rank_time_max_s": largest,
        "slowest_rank": float(seconds.index(largest)),
    }
