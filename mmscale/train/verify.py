"""Is a parallel layout equal to one process? Loss and gradient norm, step by step, on the same batches and weights.

Users run it as `mmscale verify-layout`; the test matrix runs it too. Rank 0 first takes the steps alone, as a world of
one process; then all ranks take them under the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmscale.config import Config, ParallelConfig
from mmscale.config.derived import global_micro_batches
from mmscale.config.rules import check
from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.batch import to_device
from mmscale.train.companions import companions_of
from mmscale.train.optim import make_optimizer, wrap
from mmscale.train.step import Stepper, mean_losses, reduce_sums
from mmscale.train.synthetic import SyntheticMixture

# Largest differences seen over all layouts are 1e-6 (fp32): summation order only. In bf16 tensor parallelism rounds
# partial sums to 8 bits, so losses differ by some 1e-3 after a few steps.
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}


@dataclass(frozen=True)
class Trace:
    """What the steps gave: losses and gradient norms."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


def take_steps(
    config: Config,
    *,
    steps: int,
    absent: str | None = None,
    alter: Callable[[list[Any]], None] | None = None,
) -> Trace:
    """Train on synthetic batches under the layout that is initialised, from the run's initial weights.

    Args:
        config: the run's configuration; `model.experts.share` is taken as equal shares if it is 'auto'.
        steps: optimizer steps.
        absent: modality that odd micro-batches lack.
        alter: changes the model chunks before they are wrapped (negative controls in tests).
    """
    groups = process_groups.collection()
    config = with_share(config)
    share = config.model.experts.share
    assert isinstance(share, dict)
    mixture = SyntheticMixture(config, share=share, absent=absent)
    transformer = transformer_config(config)
    chunks = build_chunks(config, groups, transformer=transformer)
    if alter is not None:
        alter(chunks)
    wrapped = wrap(config, transformer, chunks, groups)
    optimizer = make_optimizer(config, wrapped, groups)
    companions = companions_of(config, transformer, wrapped, groups)
    stepper = Stepper(config, wrapped, optimizer, groups, companions=companions)
    vocabulary = Vocabulary.from_config(config.vocab)
    rank, size = groups.dp.rank(), groups.dp.size()
    per_step = global_micro_batches(config)
    losses, norms = [], []
    for step in range(steps):
        numbers = range(step * per_step + rank, (step + 1) * per_step, size)
        result = stepper.train([to_device(mixture.micro_batch(n), vocabulary) for n in numbers], lr=config.optim.lr)
        losses.append(mean_losses(reduce_sums(result.sums, groups), config.vocab.names)["loss"])
        norms.append(result.grad_norm)
    return Trace(tuple(losses), tuple(norms))


def with_share(config: Config) -> Config:
    """The configuration with nominal shares filled in: equal ones where they would be measured from data."""
    if config.model.experts.share != "auto":
        return config
    names = config.vocab.names
    experts = config.model.experts.model_copy(update={"share": {name: 1.0 / len(names) for name in names}})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def single_process(config: Config) -> Config:
    """The same run without any parallelism and without recompute."""
    return config.model_copy(update={"parallel": ParallelConfig()})


def compare(reference: Trace, trace: Trace) -> tuple[float, float]:
    """Largest absolute difference of losses and largest relative difference of gradient norms."""
    loss = max(abs(a - b) for a, b in zip(reference.losses, trace.losses, strict=True))
    norm = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(reference.grad_norms, trace.grad_norms, strict=True))
    return loss, norm


def verify_layout(config: Config, *, steps: int, env: RankEnv | None = None) -> dict[str, Any]:
    """Compare this run's layout with one process. Called on every rank, before any process group is started.

    Args:
        config: the run's configuration, with its parallel layout.
        steps: optimizer steps, at least 3: wrong gradients hardly move the loss at first.
        env: this process's place; discovered from the environment if not given.

    Returns:
        `layout`, `steps`, `loss_difference`, `grad_norm_difference`, `tolerance`, `passed`, and both traces, on every
        rank.
    """
    from mmscale.runtime.rank_env import discover

    env = env or discover()
    check(config, world_size=env.world_size)
    reference: Trace | None = None
    if env.rank == 0:
        process_groups.initialize(RankEnv(local_rank=env.local_rank), seed=config.run.seed)
        reference = take_steps(single_process(config), steps=steps)
        process_groups.finalize()
    parallel = config.parallel
    process_groups.initialize(
        env, tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=config.run.seed
    )
    try:
        trace = take_steps(config, steps=steps)
        shared = [reference]
        torch.distributed.broadcast_object_list(shared, src=0)
        reference = shared[0]
        assert reference is not None
    finally:
        process_groups.finalize()
    loss, norm = compare(reference, trace)
    # Rounding to 3 bits turns another order of summation into another value as rounding to 8 bits does, or more.
    tolerance = TOLERANCE[config.precision.dtype if config.precision.fp8 == "off" else "bf16"]
    layout = {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp,
        "ep": parallel.ep,
        "world_size": env.world_size,
    }
    return {
        "layout": layout,
        "steps": steps,
        "loss_difference": loss,
        "grad_norm_difference": norm,
        "tolerance": tolerance,
        "passed": math.isfinite(loss) and math.isfinite(norm) and loss <= tolerance and norm <= tolerance,
        "reference": {"losses": reference.losses, "grad_norms": reference.grad_norms},
        "trace": {"losses": trace.losses, "grad_norms": trace.grad_norms},
    }
