"""The state of one rank for an exact restart on the same layout. For the memory tier, not for checkpoints.

Each rank keeps its shard of the optimizer: fp32 parameters and moments. Weights are not stored, because they follow
from the shards by the cast and the all-gather that end every optimizer step. So a snapshot is as small as the sharded
state, and no gather is needed. This module does not depend on files, other ranks or other layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from mmscale.runtime import random_state
from mmscale.train.optim.adam_compact import MOMENTS, CompactAdam
from mmscale.train.stage_state import StageState

_MAIN = "main"  # the parameter itself, next to exp_avg and exp_avg_sq
_TENSOR = "tensor:"  # placeholder in plain values for a tensor that is stored separately


def capture(state: StageState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's tensors by name, not copied, and everything else as JSON."""
    tensors = dict(state.local_tensors())
    for name, param, inner in _optimized(state):
        tensors[f"{name}.{_MAIN}"] = param
        moments = inner.state.get(param, {})
        tensors |= {f"{name}.{key}": value for key, value in moments.items() if isinstance(value, Tensor)}
    tensors |= {name: module.fp8_state() for name, module in state.scaled()}
    random: dict[str, Tensor] = {}
    plain = {
        "progress": state.progress(),
        "steps": [[group.get("step") for group in inner.param_groups] for inner in _inner(state)],
        "random": _split(random_state.capture(), "random", random),
    }
    return {name: tensor.detach() for name, tensor in tensors.items()} | random, plain


def problems(state: StageState, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> list[str]:
    """Why a snapshot does not fit this rank's model and optimizer; empty if it fits."""
    found = [f"it has no {name}" for name in ("progress", "steps", "random") if name not in plain]
    if not found and [len(steps) for steps in plain["steps"]] != [len(inner.param_groups) for inner in _inner(state)]:
        found.append("it has other parameter groups")
    wanted = {name: tensor.shape for name, tensor in state.local_tensors()}
    wanted |= {name: module.fp8_state().shape for name, module in state.scaled()}
    known = set(wanted)
    other: list[str] = []
    for name, param, inner in _optimized(state):
        wanted[f"{name}.{_MAIN}"] = param.shape
        mine = {key: value.dtype for key, value in tensors.items() if key.startswith(f"{name}.")}
        known |= mine.keys()
        kept = {key: dtype for key, dtype in mine.items() if key != f"{name}.{_MAIN}"}
        if kept and kept != {f"{name}.{key}": dtype for key, dtype in _moments(inner, param).items()}:
            other.append(name)
    if other:
        found.append(f"moments of {other[0]} are not kept as optim.optimizer and optim.moments say")
    found += [f"{name} is missing" for name in wanted if name not in tensors]
    found += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found += [f"{name} is unknown" for name in tensors if name not in known and not name.startswith("random.")]
    return found[:5]


@torch.no_grad()
def restore(state: StageState, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Restore a state that `capture` returned in another process; every rank calls it.

    Args:
        state: a new model and optimizer of the same configuration and layout.
        tensors: result of `capture` on this rank, after `problems` found none; copied.
        plain: likewise.
    """
    for name, tensor in state.local_tensors():
        tensor.copy_(tensors[name])
    for name, module in state.scaled():
        module.set_fp8_state(tensors[name])
    for name, param, inner in _optimized(state):
        param.copy_(tensors[f"{name}.{_MAIN}"])
        inner.state[param] = {
            key.removeprefix(f"{name}."): torch.empty_like(value, device=param.device).copy_(value)
            for key, value in tensors.items()
            if key.startswith(f"{name}.") and key != f"{name}.{_MAIN}"
        }
    for inner, steps in zip(_inner(state), plain["steps"], strict=True):
        for group, step in zip(inner.param_groups, steps, strict=True):
            if step is not None:
                group["step"] = step
    for optimizer in _distributed(state):
        optimizer._copy_main_params_to_model_params()
    state.gather()
    state.restore_progress(plain["progress"])
    random_state.restore(_assemble(plain["random"], tensors))


def _distributed(state: StageState) -> list[DistributedOptimizer]:
    """This rank's distributed optimizers: of dense parameters, of expert parameters, of routers.

    Those without parameters are left out.
    """
    found: list[Any] = []
    for optimizer in state.optimizers():
        found += optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [optimizer for optimizer in found if not optimizer.is_stub_optimizer]


def _inner(state: StageState) -> list[torch.optim.Optimizer]:
    """The optimizers that update this rank's shards."""
    return [optimizer.optimizer for optimizer in _distributed(state)]


def _optimized(state: StageState) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer]]:
    """Every shard with a name and its optimizer. For one layout megatron always assigns the same shards to a rank."""
    for number, inner in enumerate(_inner(state)):
        for group_number, group in enumerate(inner.param_groups):
            for index, param in enumerate(group["params"]):
                yield f"optimizer.{number}.{group_number}.{index}", param, inner


def _moments(inner: torch.optim.Optimizer, param: Tensor) -> dict[str, torch.dtype]:
    """State tensors that an optimizer keeps for a shard, by name."""
    if isinstance(inner, CompactAdam):
        return {name: dtype for name, (dtype, _) in inner.layout(param).items()}
    return dict.fromkeys(MOMENTS, torch.float32)  # the memory tier refuses Transformer-Engine's own types


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested values with tensors replaced by their names; a tuple becomes a list."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return f"{_TENSOR}{name}"
    if isinstance(value, dict):
        return {key: _split(entry, f"{name}.{key}", tensors) for key, entry in value.items()}
    return value


def _assemble(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)].clone()
    if isinstance(value, dict):
        return {key: _assemble(entry, tensors) for key, entry in value.items()}
    return value
