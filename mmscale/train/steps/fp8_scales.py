"""Delayed FP8 scales during a run: reduced over ranks after every step, stored in checkpoints under the weights' names.

Also gives the number of the step to products that round stochastically (NVFP4).

For emulated FP8; Transformer-Engine does this by itself. mmscale.model.fp8_emulate records amax values and computes
scales. Scales change only when a step was applied: amax values of a rejected batch or a dry run are forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.checkpoint.tensors import SCALING
from mmscale.model.fp8_emulate import DelayedScales, Fp8Product
from mmscale.model.sharding import box_of
from mmscale.train.steps.batch import Batch


def scales_of(chunks: Iterable[torch.nn.Module]) -> list[DelayedScales]:
    """All scales of this rank, in the same order on all ranks of a pipeline stage; empty without delayed scaling."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, DelayedScales)]


class DelayedScaling:
    """Updates the scales after every step that was applied (a `StepObserver`)."""

    def __init__(self, scales: Sequence[DelayedScales], groups: ProcessGroupCollection) -> None:
        self.groups = groups
        self.scales = scales

    def begin(self, batches: Sequence[Batch]) -> None:
        """Forget amax values of an earlier batch whose step was not applied."""
        del batches
        for scales in self.scales:
            scales.seen.zero_()

    @torch.no_grad()
    def finish(self, *, lr: float) -> None:
        """Take the largest amax over micro-batches and over the ranks that hold the same weight or shards of it."""
        del lr
        for experts, replicas in ((False, self.groups.dp_cp), (True, self.groups.expt_dp)):
            mine = [scales for scales in self.scales if (scales.place is not None) is experts]
            if not mine:
                continue
            flat = torch.cat([scales.seen.reshape(-1) for scales in mine])
            for group in (replicas, self.groups.tp):
                if group.size() > 1:
                    torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX, group=group)
            for scales, seen in zip(mine, flat.split([scales.seen.numel() for scales in mine]), strict=True):
                scales.seen.copy_(seen.view_as(scales.seen))
                scales.update()


class RoundingSteps:
    """Gives products the number of the step, so that a resumed run rounds as if it had not stopped (`StepObserver`).

    Args:
        chunks: the model.
        per_step: micro-batches of a step, over all ranks.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], *, per_step: int) -> None:
        modules = [module for chunk in chunks for module in chunk.modules()]
        self.products = [module for module in modules if isinstance(module, Fp8Product) and module.recipe.stochastic]
        self.per_step = per_step

    def begin(self, batches: Sequence[Batch]) -> None:
        """Set the step of these batches, the same on every rank."""
        for product in self.products:
            product.step = batches[0].params.noise_key // self.per_step

    def finish(self, *, lr: float) -> None:
        """Nothing to do."""
        del lr


def sharded(chunks: Iterable[torch.nn.Module]) -> dict[str, ShardedTensor]:
    """The scales as tensors of a checkpoint, by name: experts' over expert-parallel ranks, others replicated."""
    found = {}
    for scales in scales_of(chunks):
        groups = scales.groups
        replicas = groups.dp_cp if scales.place is None else groups.expt_dp
        name = f"{scales.name}{SCALING}"
        found[name] = box_of(
            name,
            scales.state,
            axes={} if scales.place is None else {1: scales.place},
            replica_id=(0, groups.tp.rank(), replicas.rank()),
        )
    return found


def restore(chunks: Iterable[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    """Restore the scales that were read; those that the checkpoint lacks keep their initial state: ones, no history."""
    for scales in scales_of(chunks):
        if (state := loaded.get(f"{scales.name}{SCALING}")) is not None:
            scales.state.copy_(state)
