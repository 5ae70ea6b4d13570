"""The optimizer of auxiliary routers, used in a separate stage (router_step.py) or during the main run.

The gradients come from the layers' forward pass (model/auxiliary.py). Here they are summed over ranks, divided by the
number of decisions of each router, clipped and applied by a separate AdamW, sharded over data-parallel ranks like
the main one. They are independent of the main model's gradients, gradient norm and optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmscale.config import Config
from mmscale.model.auxiliary import RouterLearning, calibrated, ratios, routers_of
from mmscale.runtime import device
from mmscale.runtime.groups import gathered
from mmscale.train.optim.optimizer import aligned_shards, apply, make_optimizer, measure, set_learning_rate
from mmscale.train.steps.batch import Batch


@dataclass(frozen=True)
class RouterFigures:
    """Metrics of one router over some batches, on all ranks.

    Attributes:
        loss: mean binary cross entropy of a decision; 0 if it decided nothing.
        decisions: their number; 0 if the batches lack its modality.
        sums: for each group or modality, sums with the names of mmscale.model.auxiliary.FIGURES.
    """

    loss: float
    decisions: float
    sums: dict[str, list[float]]


Figures = dict[tuple[int, str], RouterFigures]  # by layer, from 1, and kind: "experts/<group>" or "depth"


@dataclass(frozen=True)
class RouterGradient:
    """The gradient of the routers of the whole model from the batches of a step, before it is applied.

    Attributes:
        grad_norm: norm of all routers' gradient before clipping; NaN if any gradient or loss is not finite.
        loss: mean over routers of the mean binary cross entropy of a decision; None if no router decided anything.
    """

    grad_norm: float
    loss: float | None


class AuxiliaryTrainer:
    """The auxiliary routers of this rank's chunks with their gradient buffers and optimizer.

    Args:
        config: `auxiliary.optim`, precision.
        transformer: megatron-core's view of the model.
        chunks: the model's chunks, wrapped or not.
        groups: process groups.
    """

    def __init__(
        self,
        config: Config,
        transformer: TransformerConfig,
        chunks: Sequence[nn.Module],
        groups: ProcessGroupCollection,
    ) -> None:
        self.config = config.model_copy(update={"optim": config.auxiliary.optim})
        self.groups = groups
        self.learning = RouterLearning(gradients=True)
        held = nn.ModuleList([router for chunk in chunks for router in routers_of(chunk)])
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
            use_distributed_optimizer=True,
            pad_buckets_for_high_nccl_busbw=aligned_shards(self.config.optim.moments),
        )
        held.requires_grad_(True)  # only while buffers and optimizer are created, which skip parameters without it
        self.module = DistributedDataParallel(
            config=transformer, ddp_config=ddp, module=held, disable_bucketing=True, pg_collection=groups
        )
        scale = transformer.grad_scale_func
        self.optimizer: MegatronOptimizer = make_optimizer(
            self.config.model_copy(
                update={"parallel": self.config.parallel.model_copy(update={"overlap_param_gather": False})}
            ),
            [self.module],
            groups,
        )
        transformer.grad_scale_func = scale  # restore the main optimizer's function, if there is one
        held.requires_grad_(False)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step: the routers learn from the next forward passes of these batches."""
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.learning.clear()
        for batch in batches:
            batch.params.learning = self.learning

    @torch.no_grad()
    def measure(self) -> RouterGradient:
        """Reduce the gradients of the batches and return their norm, the same on every rank; nothing is applied."""
        records = sorted(self.learning.records.items(), key=lambda entry: entry[0])
        self.module.finish_grad_sync()
        parameters = [p for _, record in records for p in record.router.parameters()]
        if parameters and self.groups.tp.size() > 1:  # each rank has learned from its own tokens (sequence parallelism)
            gradients: list[Tensor] = [p.main_grad for p in parameters]  # type: ignore[attr-defined]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat, group=self.groups.tp)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        mine = torch.zeros(
            1, 2, dtype=torch.float64, device=device.taken()
        )  # sum of mean losses, number of routers that decided
        if records:
            totals = torch.stack([torch.stack((record.decisions, record.loss)) for _, record in records])
            _sum_over_tokens(totals, self.groups)
            decisions = totals[:, 0].clamp(min=1.0)
            for (_, record), number in zip(records, decisions, strict=True):
                for parameter in record.router.parameters():
                    parameter.main_grad.div_(number)  # type: ignore[attr-defined]
            # A modality that the step lacks has routers that decided nothing.
            mine[0, 0], mine[0, 1] = (totals[:, 1] / decisions).sum(), (totals[:, 0] > 0).sum()
            if self.groups.dp_cp.rank() > 0:  # every replica has the sum, so only one is counted
                mine.zero_()
        norm, total = measure(self.optimizer, mine, self.groups)
        losses, number = total[0].tolist()
        return RouterGradient(grad_norm=norm, loss=losses / number if number else None)

    @torch.no_grad()
    def apply(self, grad_norm: float, *, lr: float) -> bool:
        """Clip and apply the gradient from `measure`. Returns whether it was applied."""
        set_learning_rate(self.optimizer, self.config, lr)
        return apply(self.optimizer, grad_norm)

    def step(self, *, lr: float) -> bool:
        """Measure and apply. A gradient that is not finite leaves the routers unchanged.

        Returns whether it was applied.
        """
        gradient = self.measure()
        return math.isfinite(gradient.grad_norm) and self.apply(gradient.grad_norm, lr=lr)

    def figures(self) -> Figures:
        """Metrics of every router of the model for the last step's batches; every rank calls it."""
        return figures(self.learning, self.groups)

    def sharded(self, models: Mapping[str, Any], *, loading: bool, metadata: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's sharded state dict.

        Args:
            models: sharded state dicts of the chunks.
            loading: whether a checkpoint is going to be read into it.
            metadata: how megatron's optimizers name their state.
        """
        state: dict[str, Any] = self.optimizer.sharded_state_dict(dict(models), is_loading=loading, metadata=metadata)
        return state


def figures(learning: RouterLearning, groups: ProcessGroupCollection) -> Figures:
    """Sums of all ranks, by layer and kind; every rank calls it and gets the routers of all pipeline stages."""
    mine: Figures = {}
    for key, record in sorted(learning.records.items(), key=lambda entry: entry[0]):
        names = list(record.figures)
        rows = torch.stack((torch.stack((record.loss, record.decisions)).to(torch.float64),))
        total = torch.cat((rows.flatten(), *(record.figures[name] for name in names)))
        _sum_over_tokens(total, groups)
        values = total.tolist()
        width = (len(values) - 2) // len(names)
        sums = {name: values[2 + n * width : 2 + (n + 1) * width] for n, name in enumerate(names)}
        mine[key] = RouterFigures(loss=values[0] / max(values[1], 1.0), decisions=values[1], sums=sums)
    if groups.pp.size() == 1:
        return mine
    everything: Figures = {}
    for part in gathered(mine, group=groups.pp):
        everything |= part
    return dict(sorted(everything.items()))


def set_thresholds(learning: RouterLearning, groups: ProcessGroupCollection) -> None:
    """Set each router's thresholds so that it decides as often as the true choice did; every rank calls it."""
    for _, record in sorted(learning.records.items(), key=lambda entry: entry[0]):
        assert record.histogram is not None and record.taken is not None
        counts = torch.cat((record.histogram, record.taken.unsqueeze(1)), dim=1)
        _sum_over_tokens(counts, groups)
        record.router.threshold.copy_(calibrated(counts[:, :-1], counts[:, -1]))


def _sum_over_tokens(values: Tensor, groups: ProcessGroupCollection) -> None:
    """Sum in place over the ranks that hold other tokens of the same layers."""
    if groups.tp.size() > 1:
        torch.distributed.all_reduce(values, group=groups.tp)
    torch.distributed.all_reduce(values, group=groups.dp_cp)


def summary(found: Figures) -> dict[str, float]:
    """Means over layers for logs: `loss`, `accuracy/<kind>` and the like by kind of decision.

    Routers that decided nothing are left out; `loss` is missing if none did.
    """
    values: dict[str, list[float]] = {}
    for (_, kind), router in found.items():
        if router.decisions:
            values.setdefault("loss", []).append(router.loss)
        total = torch.tensor([*router.sums.values()]).sum(dim=0)
        for name, value in ratios(total).items():
            values.setdefault(f"{kind}/{name}", []).append(value)
    return {name: sum(entries) / len(entries) for name, entries in values.items()}


def table(found: Figures) -> list[dict[str, Any]]:
    """One row for each layer and modality: `layer` (from 0), `kind`, `modality`, and the entries of `ratios`."""
    rows = []
    for (layer, kind), router in found.items():
        for name, sums in router.sums.items():
            row = {"layer": layer - 1, "kind": kind.split("/")[0], "modality": name}
            rows.append({**row, **ratios(torch.tensor(sums, dtype=torch.float64))})
    return rows
