"""Evaluates one layout of a configuration: memory, time, traffic, and its advantages and disadvantages.

search.py tries all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmscale.config import Config
from mmscale.config.derived import (
    data_parallel_size,
    expert_counts,
    experts_of_ranks,
    micro_batches_per_step,
    sends_keys_around,
)
from mmscale.plan.activations import on_gpu
from mmscale.plan.communication import communication, sent_by_kind
from mmscale.plan.compute import Flops, flops_per_token
from mmscale.plan.memory import GIB, RankMemory, stages_memory
from mmscale.plan.parameters import Parameters, count_parameters
from mmscale.plan.stages import dtype_bytes, stage_layers
from mmscale.plan.timing import StepTime, mfu, step_time
from mmscale.tables.gpus import DEFAULT, GPUS, Gpu

# Usable fraction of memory. The rest is for fragmentation, NCCL's own buffers and the device's context.
USABLE = 0.9


@dataclass(frozen=True)
class Layout:
    """One layout of a configuration.

    Attributes:
        config: the configuration with this layout in `parallel` and this micro-batch size in `train`.
        world: ranks.
        memory: of the fullest rank.
        fits: whether that is within the given memory; None if none was given.
        time: of an optimizer step.
        mfu: model FLOP/s divided by the device's bf16 peak.
        reasons: advantages and disadvantages, in words.
    """

    config: Config
    world: int
    memory: RankMemory
    fits: bool | None
    time: StepTime
    mfu: float
    reasons: tuple[str, ...]

    @property
    def cost(self) -> float:
        """Time of a step, by which layouts are ordered [s]."""
        return self.time.total

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that a rank of the first stage sends in a step, by kind."""
        return sent_by_kind(communication(self.config, self.world))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.config.train.global_batch_size * self.config.model.seq_length / self.time.total

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale plan --json`."""
        parallel = self.config.parallel
        return {
            "tp": parallel.tp,
            "pp": parallel.pp,
            "vpp": parallel.vpp,
            "pp_layers": None if parallel.pp_layers is None else list(parallel.pp_layers),
            "ep": parallel.ep,
            "cp": parallel.cp,
            "dp": data_parallel_size(self.config, self.world),
            "recompute": parallel.recompute,
            "recompute_modules": list(parallel.recompute_modules) if parallel.recompute == "selective" else [],
            "micro_batch_size": self.config.train.micro_batch_size,
            "micro_batches_per_step": micro_batches_per_step(self.config, self.world),
            "parameters_per_rank": round(self.memory.parameters / dtype_bytes(self.config)),
            "memory": self.memory.as_dict(),
            "fits": self.fits,
            "cost": {
                "total": self.cost,
                "compute": self.time.compute,
                "communication": self.time.communication,
                "bubble": self.time.bubble,
            },
            "time_s": self.time.as_dict(),
            "tokens_per_second": round(self.tokens_per_second),
            "mfu": round(self.mfu, 4),
            "communication_bytes": {kind: round(sent) for kind, sent in self.sent.items()},
            "reasons": list(self.reasons),
        }


def recompute_label(config: Config) -> str:
    """What is recomputed, in one word for each part."""
    parallel = config.parallel
    return "+".join(parallel.recompute_modules) if parallel.recompute == "selective" else parallel.recompute


def usable_bytes(gpu_memory: float) -> float:
    """Bytes of a device's memory (given in GiB) that tensors may use."""
    return USABLE * gpu_memory * GIB


def evaluate(
    config: Config,
    world: int,
    *,
    gpu_memory: float | None = None,
    gpu: Gpu | None = None,
    parameters: Parameters | None = None,
    flops: Flops | None = None,
    memory: RankMemory | None = None,
) -> Layout:
    """Memory, time and reasons of a configuration's layout.

    Args:
        config: a configuration that passes the rules for `world` ranks.
        world: ranks.
        gpu_memory: memory of a device [GiB].
        gpu: figures of the device; None: the default one's.
        parameters: result of `count_parameters`, if it is available.
        flops: result of `flops_per_token`, likewise.
        memory: of the fullest rank, likewise.
    """
    gpu = gpu or GPUS[DEFAULT]
    parameters = parameters or count_parameters(config)
    flops = flops or flops_per_token(config)
    memory = memory or fullest(config, world, parameters)
    fits = None if gpu_memory is None else memory.total <= usable_bytes(gpu_memory)
    time = step_time(config, world, gpu, parameters=parameters)
    return Layout(
        config=config,
        world=world,
        memory=memory,
        fits=fits,
        time=time,
        mfu=mfu(config, world, gpu, seconds=time.total, flops=flops.training),
        reasons=_reasons(config, gpu, memory=memory, gpu_memory=gpu_memory, time=time),
    )


def fullest(config: Config, world: int, parameters: Parameters) -> RankMemory:
    """Memory of the fullest rank, with the kernels of the configuration on a GPU."""
    ranks = stages_memory(config, world, kernels=on_gpu(config), parameters=parameters)
    return max(ranks, key=lambda rank: rank.total)


def _reasons(
    config: Config, gpu: Gpu, *, memory: RankMemory, gpu_memory: float | None, time: StepTime
) -> tuple[str, ...]:
    parallel, used = config.parallel, memory.total / GIB
    reasons = []
    if gpu_memory is not None and memory.total > usable_bytes(gpu_memory):
        most = max(
            ("activations", memory.activations),
            ("weights, gradients and optimizer", memory.states),
            ("logits", memory.logits),
            key=lambda part: part[1],
        )
        reasons.append(
            f"does not fit: {used:.1f} GiB of {USABLE * gpu_memory:.1f} usable GiB, most of it {most[0]} "
            f"({most[1] / GIB:.1f})"
        )
    if parallel.tp > gpu.per_node:
        reasons.append(f"tensor parallelism leaves the node of {gpu.per_node}")
    if parallel.tp > 1:
        reasons.append(f"tp messages {_share(time.tp, time)}")
    reasons += _exchanges(config, gpu, time)
    if parallel.pp > 1:
        reasons.append(f"pipeline waits {_share(time.bubble, time)}")
        if parallel.pp_layers is not None:
            reasons.append(f"stages of {', '.join(map(str, parallel.pp_layers))} layers")
        if config.model.depth is not None:
            depth = [sum(map(config.model.is_depth_layer, stage_layers(config, s))) for s in range(parallel.pp)]
            if len(set(depth)) > 1:
                reasons.append(f"stages differ in Mixture-of-Depths layers ({min(depth)} to {max(depth)})")
    if parallel.recompute != "none":
        names = {"core_attn": "attention", "mlp": "feed-forward"}
        parts = " and ".join(names[name] for name in parallel.recompute_modules)
        what = parts if parallel.recompute == "selective" else "every layer"
        reasons.append(f"recomputes {what} {_share(time.recompute, time)}")
    if parallel.tp * parallel.pp * parallel.ep * parallel.cp == 1:
        reasons.append("data parallelism only")
    if time.dp > 0.01 * time.total:
        reasons.append(f"gradients and parameters not hidden {_share(time.dp, time)}")
    return tuple(reasons)


def _exchanges(config: Config, gpu: Gpu, time: StepTime) -> list[str]:
    """The messages among the ranks of a sequence, and among those that share the experts, in words."""
    parallel = config.parallel
    how = "attention in a ring" if sends_keys_around(config) else "gathered"
    return [
        f"{what} {'inside' if parallel.tp * ranks <= gpu.per_node else 'across'} nodes {_share(seconds, time)}"
        for ranks, what, seconds in (
            (parallel.cp, f"sequences split over {parallel.cp} ranks, {how}", time.cp),
            (parallel.ep, f"{_experts_per_rank(config)} per rank, exchange", time.ep),
        )
        if ranks > 1
    ]


def _experts_per_rank(config: Config) -> str:
    """Which part of the experts a rank holds, in words."""
    counts, ranks = expert_counts(config), config.parallel.ep
    if not any(count % ranks for count in counts.values()):
        return f"1/{ranks} of the experts"
    held = [sum(len(own[rank]) for own in experts_of_ranks(counts, ranks).values()) for rank in range(ranks)]
    number = f"{min(held)} to {max(held)}" if min(held) < max(held) else f"{max(held)}"
    return f"{number} of the {sum(counts.values())} experts (groups are not divisible)"


def _share(part: float, time: StepTime) -> str:
    return f"{part / time.total:.0%}"
