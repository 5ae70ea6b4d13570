"""Measures the memory of a training step on a rank, by tensors and not by an allocator, and compares it with the plan.

    mmscale bench footprint configs/quickstart.yaml [key=value ...]
    mmscale bench footprint --cases

One process, without parallelism; runs on a CPU and on a GPU. Every storage is counted once, from its creation until
nothing refers to it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmscale.bench import footprint_cases
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.config.rules import check
from mmscale.data.vocab import Vocabulary
from mmscale.errors import UsageError
from mmscale.plan import rank_memory
from mmscale.plan.activations import Kernels, on_gpu
from mmscale.plan.memory import kept_for_backward
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import assembly
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import with_share
from mmscale.train.steps.batch import part_of, to_device


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank in a training step.

    Attributes:
        parameters: weights.
        gradients: gradient buffers.
        optimizer: moments and main copies.
        saved: peak of what autograd keeps for backward.
        step: peak of tensors besides parameters, gradients and optimizer state.
    """

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    step: int

    @property
    def total(self) -> int:
        """Peak of everything."""
        return self.parameters + self.gradients + self.optimizer + self.step


class _Alive:
    """Bytes of storages that are alive, and their peak."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.uses: Counter[int] = Counter()
        self.now = 0
        self.most = 0

    def enter(self, holder: Any, storage: torch.UntypedStorage) -> None:
        """Count a storage until `holder` is destroyed."""
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or key in self.known:
            return
        if self.uses[key] == 0:
            self.now += size
            self.most = max(self.most, self.now)
        self.uses[key] += 1
        weakref.finalize(holder, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.uses[key] -= 1
        if self.uses[key] == 0:
            self.now -= size


class _Storages(TorchDispatchMode):
    """Counts every storage that an operation returns."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.alive = _Alive(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.alive.enter(storage, storage)
        return result


class _Held:
    """A saved tensor, wrapped so that its release is noticed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def _saved(known: set[int]) -> Iterator[_Alive]:
    alive = _Alive(known)

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.enter(held, tensor.untyped_storage())
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield alive


def measure(config: Config) -> Footprint:
    """Take optimizer steps on synthetic tokens and count; process groups of the configuration's layout must exist.

    Args:
        config: the run's configuration; one global batch of it is the step.
    """
    groups = process_groups.collection()
    config = with_share(config)
    share = config.model.experts.share
    assert isinstance(share, dict)
    built = assembly.build(config, groups)
    mixture, vocabulary = SyntheticMixture(config, share=share), Vocabulary.from_config(config.vocab)
    own = part_of(groups).batch(mixture, 0, global_micro_batches(config))
    batches = [to_device(content, vocabulary) for content in own]
    built.stepper.train(batches, lr=config.optim.lr)  # creates the optimizer's state

    weights, gradients, state = _storages(built)
    known = set(weights) | set(gradients) | set(state)
    known |= {buffer.untyped_storage().data_ptr() for chunk in built.chunks for buffer in chunk.module.buffers()}
    with _saved(known) as kept:
        built.stepper.accumulate(batches)
    with _Storages(known) as mode:
        built.stepper.train(batches, lr=config.optim.lr)
    return Footprint(
        parameters=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(state.values()),
        saved=kept.most,
        step=mode.alive.most,
    )


def _storages(built: assembly.TrainingParts) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Bytes by storage of weights, gradients and optimizer state; a storage is counted only in the first of them."""
    weights = _by_storage([parameter.data for chunk in built.chunks for parameter in chunk.parameters()])
    buffers = [buffer for chunk in built.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = _by_storage([buffer.grad_data for buffer in buffers])
    held: list[Tensor] = []
    for part in getattr(built.optimizer, "chained_optimizers", [built.optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        held += [parameter.data for group in inner.param_groups for parameter in group["params"]]
        held += [value for values in inner.state.values() for value in values.values() if isinstance(value, Tensor)]
    state = _by_storage(held)
    return weights, gradients, {key: size for key, size in state.items() if key not in weights}


def _by_storage(tensors: list[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def compare(config: Config, found: Footprint, *, kernels: Kernels) -> list[tuple[str, float, float]]:
    """Rows (what, planned bytes, measured bytes) for one process."""
    planned = rank_memory(config, 1, kernels=kernels)
    return [
        ("parameters", planned.parameters, found.parameters),
        ("gradients", planned.gradients, found.gradients),
        ("optimizer", planned.optimizer, found.optimizer),
        ("kept for backward", kept_for_backward(config, kernels=kernels), found.saved),
        ("step", planned.total - planned.states, found.step),
        ("total", planned.total, found.total),
    ]


def run(config: Config | None = None, *, cases: bool = False) -> dict[str, Any]:
    """Measure a configuration on one process, whatever its layout.

    Args:
        config: the run's configuration.
        cases: measure the models for which the plan was compared (footprint_cases.py) instead.

    Returns:
        `kernels` and `rows`: name -> planned and measured bytes; with cases, `cases`: name -> such rows, and `ratios`:
        row -> smallest and largest planned over measured.

    Raises:
        UsageError: no configuration, or one and `cases`.
    """
    if (config is None) is not cases:
        raise UsageError(
            "bench footprint: no configuration" if config is None else "bench footprint: a configuration and --cases",
            remedy="name one, e.g. configs/quickstart.yaml, or say --cases",
        )
    if config is not None:
        return _one(config)
    found = {name: _one(case) for name, case in footprint_cases.cases()}
    ratios: dict[str, list[float]] = {}
    for result in found.values():
        for name, row in result["rows"].items():
            ratios.setdefault(name, []).append(row["planned"] / row["found"])
    return {
        "kernels": next(iter(found.values()))["kernels"],
        "cases": {name: result["rows"] for name, result in found.items()},
        "ratios": {name: {"min": min(values), "max": max(values)} for name, values in ratios.items()},
    }


def _one(config: Config) -> dict[str, Any]:
    one = config.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": None, "ep": 1, "overlap_experts": False})
    alone = with_share(config.model_copy(update={"parallel": one}))
    check(alone, world_size=1)
    assembly.start(alone, RankEnv())
    try:
        kernels = on_gpu(alone) if device.has_cuda() else Kernels.HOST
        rows = compare(alone, measure(alone), kernels=kernels)
    finally:
        process_groups.finalize()
    return {
        "kernels": kernels.value,
        "rows": {name: {"planned": round(planned), "found": round(found)} for name, planned, found in rows},
    }


def render(result: dict[str, Any]) -> str:
    """The rows as a table in MiB; with cases, planned over measured."""
    if "cases" in result:
        return _render_cases(result)
    lines = [f"{result['kernels']:<20} {'planned MiB':>14} {'found MiB':>14} {'ratio':>7}"]
    for name, row in result["rows"].items():
        planned, found = row["planned"] / 2**20, row["found"] / 2**20
        ratio = f"{planned / found:.3f}" if found else "-"
        lines.append(f"{name:<20} {planned:>14,.1f} {found:>14,.1f} {ratio:>7}")
    return "\n".join(lines)


def _render_cases(result: dict[str, Any]) -> str:
    shown = ("kept for backward", "step", "total")
    title = f"{result['kernels']}: planned over found"
    lines = [f"{title:<48}" + "".join(f"{name:>20}" for name in shown)]
    for name, rows in result["cases"].items():
        ratios = "".join(f"{rows[part]['planned'] / rows[part]['found']:>20.3f}" for part in shown)
        lines.append(f"{name:<48}{ratios}")
    lines.append("")
    for name, ratio in result["ratios"].items():
        lines.append(f"{name:<20} {ratio['min']:.3f} to {ratio['max']:.3f}")
    return "\n".join(lines)
