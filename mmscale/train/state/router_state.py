"""The state that the auxiliary stage's checkpoints store, and functions that separate routers from other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from mmscale.checkpoint.tensors import TensorEntry
from mmscale.model.auxiliary import is_routers_key
from mmscale.train.optim.optimizer import load_optimizer
from mmscale.train.optim.shards import expect
from mmscale.train.stage_state import Counters
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer


@dataclass
class RouterState(Counters):
    """The content of a checkpoint of the stage: routers, thresholds, their optimizer and counters. No main weights.

    `sequences` is counted from the main run's start, all other counters from the stage's.

    Attributes:
        models: the chunks as GPTModels.
        trainer: routers and optimizer; None if only weights are needed.
        calibrated: whether thresholds were set after the last step.
        metadata: how megatron's optimizers name their state.
        tokens_per_step: used to compute the token count of older checkpoints, which did not store it [tokens].
    """

    models: list[Any]
    trainer: AuxiliaryTrainer | None
    calibrated: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens_per_step: int = 0

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank."""
        state = router_tensors(self.models, self.metadata)
        if self.trainer is not None:
            models = {name: part for name, part in state.items() if part}
            state["optimizer"] = self.trainer.sharded(models, loading=loading, metadata=dict(self.metadata))
        if not loading:
            state["progress"] = self.progress()
        return state

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return super().progress() | {"calibrated": self.calibrated}

    def expect(self, stored: Mapping[str, TensorEntry]) -> None:
        """Set the tensors of the checkpoint that is going to be read."""
        if self.trainer is not None:
            expect(self.trainer.optimizer, stored)

    def restore(self, loaded: dict[str, Any]) -> None:
        """Restore the state that was read."""
        load_router_tensors(self.models, loaded)
        if self.trainer is not None:
            load_optimizer(self.trainer.optimizer, loaded["optimizer"])
        self.restore_progress(loaded["progress"])

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Restore the result of `progress`."""
        missing = {"stream": [], "tokens": plain["step"] * self.tokens_per_step}  # fields that older checkpoints lack
        super().restore_progress(missing | dict(plain))

    def optimizers(self) -> list[MegatronOptimizer]:
        """The routers' optimizer."""
        return [] if self.trainer is None else [self.trainer.optimizer]

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Thresholds.

        All else that the stage changes is in the optimizer's shards; main weights belong to the main run.
        """
        for index, model in enumerate(self.models):
            for name, buffer in model.named_buffers():
                if is_routers_key(f".{name}"):
                    yield f"model.{index}.{name}", buffer

    def scaled(self) -> Iterator[tuple[str, Any]]:
        """Modules with FP8 scales: none, the stage runs without FP8."""
        return iter(())

    def gather(self) -> None:
        """Fill the routers' parameters from the optimizer's shards of all ranks; every rank calls it."""
        if self.trainer is not None:
            self.trainer.module.start_param_sync(force_sync=True)


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
    """Copy the tensors that were read for `router_tensors` into the chunks; all other weights are unchanged."""
    for name, model in zip(_chunk_names(models), models, strict=True):
        missing, unexpected = model.load_state_dict(loaded.get(name, {}), strict=False)
        assert not unexpected and not [key for key in missing if is_routers_key(f".{key}")], (missing, unexpected)


def main_tensors(models: Sequence[Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All other parts of the sharded state dicts, i.e. those that a main run without routers has saved."""
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
    """Copy the tensors that were read for `main_tensors` into the chunks; routers are unchanged."""
    for name, model in zip(_chunk_names(models), models, strict=True):
        missing, unexpected = model.load_state_dict(loaded[name], strict=False)
        assert not unexpected and all(is_routers_key(f".{key}") for key in missing), (missing, unexpected)


def _chunk_names(models: Sequence[Any]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
