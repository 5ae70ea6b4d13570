"""Connects the memory tier to a run: takes snapshots after steps, restores them at a restart, and frees memory.

resilience/memory_tier.py stores the snapshots; local_state.py defines their content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.errors import TrainingError
from mmscale.resilience.generations import INDEX
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stage_state import StageState
from mmscale.train.state import local_state
from mmscale.train.steps.step_report import StepReport
from mmscale.train.throughput import Throughput

STALL = "memory_stall_s"


class MemoryHook:
    """Takes snapshots. It must be the last hook of a step, so that the changes of other hooks are included.

    Args:
        tier: stores them.
        clock: measures the copy as a pause, not as a part of the step time.
    """

    def __init__(self, tier: MemoryTier, *, clock: Throughput) -> None:
        self.tier = tier
        self.clock = clock

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Take a snapshot every `resilience.memory_every` steps."""
        if self.tier.due(state.step):
            with self.clock.measure(STALL):
                self.tier.snapshot(state.step, *local_state.capture(state))


@contextlib.contextmanager
def memory_of(
    config: Config, env: RankEnv, *, run: Path, attempt: int, on_event: Callable[..., None], warn: Callable[[str], None]
) -> Iterator[MemoryTier | None]:
    """The memory tier of an attempt; None if it is off and no snapshot was left. Every rank calls it.

    Snapshots are deleted when the attempt ends well, because the disk has a checkpoint then, and when training gave up,
    because it would give up again. After any other end the guard processes keep them for the next attempt.

    Args:
        config: the run's configuration.
        env: place of this rank.
        run: the run's folder.
        attempt: number of this attempt.
        on_event: writes events, on rank 0.
        warn: prints warnings for the user, on rank 0.
    """

    def report_event(event: str, **fields: Any) -> None:
        on_event(event, **fields)
        if event == "memory_restored":
            rebuilt = f", ranks {fields['rebuilt']} rebuilt from parity" if fields["rebuilt"] else ""
            warn(f"resumes from memory: step {fields['step']} of attempt {fields['of_attempt']}{rebuilt}")
        elif event == "memory_refused":
            warn(f"warning: memory of attempt {fields['of_attempt']} is not used: {'; '.join(fields['reasons'][:3])}")
        elif event == "memory_off":
            warn(f"warning: no more snapshots in memory: {'; '.join(fields['reasons'][:3])}")

    box = [(run / INDEX).exists()]
    torch.distributed.broadcast_object_list(box, src=0)
    if not config.resilience.memory_every and not box[0]:
        yield None
        return
    tier = MemoryTier(
        run,
        env=env,
        group=groups.host_group(),
        every=config.resilience.memory_every,
        group_size=config.resilience.memory_group,
        hold_s=config.resilience.memory_hold,
        attempt=attempt,
        identity={"configuration": digest(config), "layout": groups.topology()},
        on_event=report_event,
    )
    try:
        yield tier
    except TrainingError:
        tier.close()
        raise
    tier.close()


def resume_from_memory(tier: MemoryTier | None, state: StageState, *, above: int) -> bool:
    """Resume from memory if it holds an intact snapshot newer than step `above`. Every rank calls it."""
    if tier is None:
        return False
    found = tier.restore(above=above, accept=lambda tensors, plain: local_state.problems(state, tensors, plain))
    if found is None:
        return False
    _, tensors, plain = found
    local_state.restore(state, tensors, plain)
    return True
