"""Which ways to spread a configuration over ranks are possible, and which are likely to be fast.

The order comes from communication volumes and the pipeline's bubble, on round figures of a current machine. It ranks
layouts; it does not predict step times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmscale.config import Config
from mmscale.config.derived import data_parallel_size, micro_batches_per_step
from mmscale.config.rules import violations
from mmscale.plan.compute import expert_slots, flops_per_token
from mmscale.plan.memory import GIB, RankMemory, rank_memory
from mmscale.plan.parameters import count_parameters
from mmscale.plan.stages import dtype_bytes, stage_layers, stage_parameters

# Per rank: achieved FLOP/s in bf16, bytes/s inside a node and between nodes. Only their ratios matter for the order.
COMPUTE, INSIDE, BETWEEN = 4e14, 3e11, 4e10
# Time to start a message [s]: without it a small model would be spread ever thinner.
LATENCY = 2e-5
RANKS_PER_NODE = 8
# The rest is for the allocator's fragments, communication buffers and the device context.
USABLE = 0.9
_CHUNKS = (None, 2, 4)


@dataclass(frozen=True)
class Layout:
    """One way to spread a configuration.

    Attributes:
        config: the configuration with this layout in `parallel`.
        world: ranks.
        memory: of the fullest rank.
        fits: whether that is within the memory given; None if none was given.
        compute: relative time of a step's arithmetic [s].
        communication: relative time of its messages [s].
        bubble: share of the pipeline's time in which a stage waits.
        reasons: what speaks for and against it, in words.
    """

    config: Config
    world: int
    memory: RankMemory
    fits: bool | None
    compute: float
    communication: float
    bubble: float
    reasons: tuple[str, ...]

    @property
    def cost(self) -> float:
        """Relative time of a step, by which layouts are ordered [s]."""
        return self.compute * (1 + self.bubble) + self.communication

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale plan --json`."""
        parallel = self.config.parallel
        return {
            "tp": parallel.tp,
            "pp": parallel.pp,
            "vpp": parallel.vpp,
            "ep": parallel.ep,
            "dp": data_parallel_size(self.config, self.world),
            "recompute": parallel.recompute,
            "micro_batch_size": self.config.train.micro_batch_size,
            "micro_batches_per_step": micro_batches_per_step(self.config, self.world),
            "memory": self.memory.as_dict(),
            "fits": self.fits,
            "cost": {
                "total": self.cost,
                "compute": self.compute,
                "communication": self.communication,
                "bubble": self.bubble,
            },
            "reasons": list(self.reasons),
        }


def evaluate(config: Config, world: int, *, gpu_memory: float | None = None) -> Layout:
    """Memory, relative cost and reasons of the layout that a (valid) configuration has.

    Args:
        config: a configuration that passes the rules for `world` ranks.
        world: ranks.
        gpu_memory: memory of a device [GiB].
    """
    parallel = config.parallel
    memory = rank_memory(config, world)
    fits = None if gpu_memory is None else memory.total <= USABLE * gpu_memory * GIB
    micro_batches = micro_batches_per_step(config, world)
    tokens = micro_batches * config.train.micro_batch_size * config.model.seq_length
    passes = 4 if parallel.recompute == "full" else 3
    compute = passes * flops_per_token(config).forward * tokens / (parallel.tp * parallel.pp) / COMPUTE
    bubble = (parallel.pp - 1) / (micro_batches * (parallel.vpp or 1))
    communication = sum(_communication(config, world, tokens).values())
    layout = Layout(config, world, memory, fits, compute, communication, bubble, ())
    return Layout(config, world, memory, fits, compute, communication, bubble, _reasons(layout, gpu_memory))


def _communication(config: Config, world: int, tokens: int) -> dict[str, float]:
    """Time of a step's messages on one rank, by kind [s].

    Args:
        config: gives the layout.
        world: ranks.
        tokens: tokens of a step that pass through this rank's replica.
    """
    parallel, size = config.parallel, dtype_bytes(config)
    layers = stage_layers(config, 0)
    replicas = data_parallel_size(config, world)
    row = config.model.hidden_size * size
    # Sequence parallelism: gather and scatter around both sub-layers, in forward and backward, and gathers for the
    # gradients of weights.
    tensor = 10 * len(layers) * tokens * row * (1 - 1 / parallel.tp)
    slots = 0.0 if config.model.kind == "dense" else sum(expert_slots(config, config.model.seq_length).values())
    expert = 4 * len(layers) * tokens * slots * row * (1 - 1 / parallel.ep)
    pipeline = 2 * tokens * row / parallel.tp * (parallel.vpp or 1) if parallel.pp > 1 else 0.0
    dense, experts = stage_parameters(config, count_parameters(config), 0)
    gradients = (4 + size) * (dense * (1 - 1 / replicas) + experts * (1 - parallel.ep / replicas))
    visits = len(layers) * micro_batches_per_step(config, world)
    return {
        "tensor": _time(tensor, parallel.tp, messages=10 * visits),
        "expert": _time(expert, parallel.tp * parallel.ep, messages=4 * visits),
        "pipeline": _time(pipeline, world, messages=2 * micro_batches_per_step(config, world) * (parallel.vpp or 1)),
        "data": _time(gradients, parallel.tp * replicas, messages=4),
    }


def _time(volume: float, span: int, *, messages: int) -> float:
    """Time of `messages` messages of `volume` bytes together [s]; none where there is nothing to say."""
    return volume / _speed(span) + messages * LATENCY if volume else 0.0


def _speed(span: int) -> float:
    """Bytes/s within a group whose members stand among `span` consecutive ranks."""
    return INSIDE if span <= RANKS_PER_NODE else BETWEEN


def _reasons(layout: Layout, gpu_memory: float | None) -> tuple[str, ...]:
    parallel, total = layout.config.parallel, layout.memory.total / GIB
    reasons = []
    if gpu_memory is not None:
        verdict = "fits" if layout.fits else "does not fit"
        reasons.append(f"{verdict}: {total:.1f} GiB of {USABLE * gpu_memory:.1f} usable GiB")
    if parallel.tp > RANKS_PER_NODE:
        reasons.append(f"tensor parallelism leaves the node of {RANKS_PER_NODE}")
    elif parallel.tp > 1:
        reasons.append("every layer waits for tensor-parallel messages")
    if parallel.ep > 1:
        where = "inside" if parallel.tp * parallel.ep <= RANKS_PER_NODE else "across"
        reasons.append(f"each rank holds 1/{parallel.ep} of the experts, exchanged {where} nodes")
    if layout.bubble > 0:
        reasons.append(f"pipeline idle {layout.bubble / (1 + layout.bubble):.0%} of the time")
    if parallel.pp > 1 and layout.config.model.depth is not None:
        depth = [
            sum(map(layout.config.model.is_depth_layer, stage_layers(layout.config, s))) for s in range(parallel.pp)
        ]
        if len(set(depth)) > 1:
            reasons.append(f"stages differ in Mixture-of-Depths layers ({min(depth)} to {max(depth)})")
    if parallel.recompute == "full":
        reasons.append("recomputation adds a third to the arithmetic")
    if parallel.tp * parallel.pp * parallel.ep == 1:
        reasons.append("data parallelism only")
    return tuple(reasons)


def _divisors(number: int, limit: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0]


def _candidates(config: Config, world: int) -> Iterator[Config]:
    model = config.model
    most_experts = max(model.experts.counts.values(), default=1)
    recompute = dict.fromkeys([config.parallel.recompute, "none", "full"])
    for tp in _divisors(world, model.num_attention_heads):
        for pp in _divisors(world // tp, model.num_layers):
            for ep in _divisors(world // (tp * pp), most_experts):
                for vpp in _CHUNKS if pp > 1 else (None,):
                    for choice in recompute:
                        own = pp == config.parallel.pp and vpp == config.parallel.vpp
                        sends = {} if own else {"overlap_p2p": None, "batch_p2p": None}
                        change = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "cp": 1, "recompute": choice} | sends
                        yield config.model_copy(update={"parallel": config.parallel.model_copy(update=change)})


def layouts(config: Config, gpus: int, *, gpu_memory: float | None = None) -> tuple[list[Layout], dict[str, int]]:
    """All layouts of a configuration on so many devices that the rules allow, best first.

    Layouts that fit stand before those that do not; then the cheaper ones. Full recomputation is left out where the
    same layout fits without it.

    Args:
        config: the configuration; its own layout is one candidate.
        gpus: ranks, one device each.
        gpu_memory: memory of a device [GiB].

    Returns:
        The layouts, and how many candidates each rule refused.
    """
    possible: list[Layout] = []
    refused: Counter[str] = Counter()
    for candidate in _candidates(config, gpus):
        problems = violations(candidate, world_size=gpus)
        if problems:
            refused[problems[0].cause] += 1
        else:
            possible.append(evaluate(candidate, gpus, gpu_memory=gpu_memory))
    plain = {
        _key(layout) for layout in possible if layout.config.parallel.recompute == "none" and layout.fits is not False
    }
    kept = [
        layout
        for layout in possible
        if layout.config.parallel == config.parallel
        or layout.config.parallel.recompute != "full"
        or _key(layout) not in plain
    ]
    return sorted(kept, key=lambda layout: (layout.fits is False, layout.cost)), dict(refused)


def _key(layout: Layout) -> tuple[int, int, int | None, int]:
    parallel = layout.config.parallel
    return parallel.tp, parallel.pp, parallel.vpp, parallel.ep


def rank_grid(config: Config, world: int) -> list[dict[str, int]]:
    """Coordinates of every rank, in megatron-core's default order tp-cp-ep-dp-pp (tensor parallelism fastest).

    `ep` is the rank among expert-parallel ranks, which are consecutive data-parallel ranks; `edp` numbers the copies
    of the same experts.
    """
    tp, ep = config.parallel.tp, config.parallel.ep
    replicas = data_parallel_size(config, world)
    grid = []
    for rank in range(world):
        dp = rank // tp % replicas
        grid.append(
            {"rank": rank, "tp": rank % tp, "dp": dp, "pp": rank // (tp * replicas), "ep": dp % ep, "edp": dp // ep}
        )
    return grid
