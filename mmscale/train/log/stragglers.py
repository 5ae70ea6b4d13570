# Finds the rank that the others wait for, by each rank's own time of a logged step, up to the gradient reduction. Step
# times do not show it, because all ranks end a step together. A person decides whether to exclude a node.
"""Detection of slow ranks.

A rank's own time runs from the request for a batch to the end of its last backward pass. It includes its loader, its
computation, and waiting within its own replica (tensor, expert and pipeline parallel exchanges), but not waiting for
other replicas, even if gradients are reduced while backward runs. So a slow rank is identified by itself if ranks are
replicas, and together with its replica otherwise. If parameters are gathered during forward
(parallel.overlap_param_gather), each rank's forward waits for the last one to arrive, and only delays after that are
attributed to a rank.

On a device both ends are events in its queue, read after the step has been waited for anyway. The rest of the step
before, its update, is short and comes before the first event; then the queue is empty until the batch arrives, so the
loader's time lies between the events. Measured on logged steps only, and only with several ranks.
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
