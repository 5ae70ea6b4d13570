"""Optimizer steps of auxiliary routers: by themselves in their own stage, or along with the main run.

The gradients come from the layers' forward pass (model/auxiliary.py). Here they are summed over ranks, divided by the
number of decisions of each router, clipped and applied by an AdamW of their own, sharded over data-parallel ranks like
the main one. The main model's gradients, their norm and its optimizer never meet them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmscale.checkpoint.tensors import TensorEntry
from mmscale.config import Config
from mmscale.model.auxiliary import RouterLearning, calibrated, is_routers_key, ratios, routers_of
from mmscale.runtime import device
from mmscale.train.batch import Batch
from mmscale.train.optim import aligned_shards, apply, load_optimizer, make_optimizer, measure, set_learning_rate
from mmscale.train.optimizer_shards import expect


@dataclass(frozen=True)
class RouterFigures:
    """What is known of one router over some batches, on all ranks.

    Attributes:
        loss: mean binary cross entropy of a decision.
        sums: for each group or modality, sums as mmscale.model.auxiliary.FIGURES names them.
    """

    loss: float
    sums: dict[str, list[float]]


Figures = dict[tuple[int, str], RouterFigures]  # by layer, from 1, and kind: "experts/<group>" or "depth"


@dataclass(frozen=True)
class RouterStep:
    """What a step of the routers left behind.

    Attributes:
        grad_norm: norm of all routers' gradient before clipping.
        applied: False if it was not finite and the weights are as before.
    """

    grad_norm: float
    applied: bool


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
        held.requires_grad_(True)  # only while buffers and optimizer are made: they go by it
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
        transformer.grad_scale_func = scale  # the main optimizer's, if there is one
        held.requires_grad_(False)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step: these batches teach the routers while they go forward."""
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.learning.clear()
        for batch in batches:
            batch.params.learning = self.learning

    @torch.no_grad()
    def step(self, *, lr: float) -> RouterStep:
        """Reduce, clip and apply what the batches have taught."""
        records = sorted(self.learning.records.items(), key=lambda entry: entry[0])
        self.module.finish_grad_sync()
        parameters = [p for _, record in records for p in record.router.parameters()]
        if parameters and self.groups.tp.size() > 1:  # each rank taught by its own tokens (sequence parallelism)
            gradients: list[Tensor] = [p.main_grad for p in parameters]  # type: ignore[attr-defined]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat, group=self.groups.tp)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        if records:
            decisions = torch.stack([record.decisions for _, record in records])
            self._sum(decisions)
            for (_, record), number in zip(records, decisions, strict=True):
                for parameter in record.router.parameters():
                    parameter.main_grad.div_(number.clamp(min=1.0))  # type: ignore[attr-defined]
        norm, _ = measure(self.optimizer, torch.zeros(1, 2, device=device.taken()), self.groups)
        if not math.isfinite(norm):
            return RouterStep(grad_norm=norm, applied=False)
        set_learning_rate(self.optimizer, self.config, lr)
        return RouterStep(grad_norm=norm, applied=apply(self.optimizer, norm))

    def figures(self) -> Figures:
        """What the last step's batches showed of every router of the model; every rank calls it."""
        return figures(self.learning, self.groups)

    def _sum(self, values: Tensor) -> None:
        _sum_over_tokens(values, self.groups)

    def sharded(self, models: Mapping[str, Any], *, loading: bool, metadata: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's sharded state dict.

        Args:
            models: sharded state dicts of the chunks.
            loading: whether it is to be read into.
            metadata: how megatron's optimizers name their state.
        """
        state: dict[str, Any] = self.optimizer.sharded_state_dict(dict(models), is_loading=loading, metadata=metadata)
        return state


def figures(learning: RouterLearning, groups: ProcessGroupCollection) -> Figures:
    """Sums of all ranks, by layer and kind; every rank calls it and gets all pipeline stages' routers."""
    mine: Figures = {}
    for key, record in sorted(learning.records.items(), key=lambda entry: entry[0]):
        names = list(record.figures)
        rows = torch.stack((torch.stack((record.loss, record.decisions)).to(torch.float64),))
        total = torch.cat((rows.flatten(), *(record.figures[name] for name in names)))
        _sum_over_tokens(total, groups)
        values = total.tolist()
        width = (len(values) - 2) // len(names)
        sums = {name: values[2 + n * width : 2 + (n + 1) * width] for n, name in enumerate(names)}
        mine[key] = RouterFigures(loss=values[0] / max(values[1], 1.0), sums=sums)
    if groups.pp.size() == 1:
        return mine
    gathered: list[Any] = [None] * groups.pp.size()
    torch.distributed.all_gather_object(gathered, mine, group=groups.pp)
    everything: Figures = {}
    for part in gathered:
        everything |= part
    return dict(sorted(everything.items()))


def set_thresholds(learning: RouterLearning, groups: ProcessGroupCollection) -> None:
    """Put each router's thresholds where it decides as often as the true choice did; every rank calls it."""
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
    """Means over layers for logs: `loss` over all routers, `accuracy/<kind>` and the like by kind of decision."""
    values: dict[str, list[float]] = {}
    for (_, kind), router in found.items():
        values.setdefault("loss", []).append(router.loss)
        total = torch.tensor([*router.sums.values()]).sum(dim=0)
        for name, value in ratios(total).items():
            values.setdefault(f"{kind}/{name}", []).append(value)
    return {name: sum(entries) / len(entries) for name, entries in values.items()}


def table(found: Figures) -> list[dict[str, Any]]:
    """One row for each layer and modality: `layer` (from 0), `kind`, `modality`, and what `ratios` gives."""
    rows = []
    for (layer, kind), router in found.items():
        for name, sums in router.sums.items():
            row = {"layer": layer - 1, "kind": kind.split("/")[0], "modality": name}
            rows.append({**row, **ratios(torch.tensor(sums, dtype=torch.float64))})
    return rows


@dataclass
class RouterState:
    """What a checkpoint of the stage keeps: routers, thresholds, their optimizer and counters. No main weights.

    Attributes:
        models: the chunks as GPTModels.
        trainer: routers and optimizer; None if only weights are wanted.
        step: steps of the stage done.
        sequences: sequences consumed, over all ranks, counted from the main run's start.
        calibrated: whether thresholds were set after the last step.
    """

    models: list[Any]
    trainer: AuxiliaryTrainer | None
    step: int = 0
    sequences: int = 0
    calibrated: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank."""
        state = router_tensors(self.models, self.metadata)
        if self.trainer is not None:
            models = {name: part for name, part in state.items() if part}
            state["optimizer"] = self.trainer.sharded(models, loading=loading, metadata=dict(self.metadata))
        if not loading:
            state["progress"] = {"step": self.step, "sequences": self.sequences, "calibrated": self.calibrated}
        return state

    def expect(self, stored: Mapping[str, TensorEntry]) -> None:
        """Learn which tensors the checkpoint has that is going to be read."""
        if self.trainer is not None:
            expect(self.trainer.optimizer, stored)

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over what was read."""
        load_router_tensors(self.models, loaded)
        if self.trainer is not None:
            load_optimizer(self.trainer.optimizer, loaded["optimizer"])
        for name, value in loaded["progress"].items():
            setattr(self, name, value)


def router_tensors(models: Sequence[Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The routers' part of the sharded state dicts of a model's chunks, by chunk."""
    names = _chunk_names(models)
    return {
        name: {
            key: value
            for key, value in model.sharded_state_dict(metadata=dict(metadata)).items()
            if is_routers_key(f".{key}")
        }
        for name, model in zip(names, models, strict=True)
    }


def load_router_tensors(models: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    """Copy what was read for `router_tensors` into the chunks; all other weights stay."""
    for name, model in zip(_chunk_names(models), models, strict=True):
        missing, unexpected = model.load_state_dict(loaded.get(name, {}), strict=False)
        assert not unexpected and not [key for key in missing if is_routers_key(f".{key}")], (missing, unexpected)


def main_tensors(models: Sequence[Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Everything else of the sharded state dicts: what a main run without routers has saved."""
    names = _chunk_names(models)
    return {
        name: {
            key: value
            for key, value in model.sharded_state_dict(metadata=dict(metadata)).items()
            if not is_routers_key(f".{key}")
        }
        for name, model in zip(names, models, strict=True)
    }


def load_main_tensors(models: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    """Copy what was read for `main_tensors` into the chunks; routers stay."""
    for name, model in zip(_chunk_names(models), models, strict=True):
        missing, unexpected = model.load_state_dict(loaded[name], strict=False)
        assert not unexpected and all(is_routers_key(f".{key}") for key in missing), (missing, unexpected)


def _chunk_names(models: Sequence[Any]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
