"""Searches all layouts of a configuration: TP x PP x VPP x CP x EP x DP x recompute x micro-batch, fastest first.

Recomputation is tried only if a layout does not fit without it, because it never makes a step faster.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mmscale.config import Config
from mmscale.config.derived import data_parallel_size, expert_counts
from mmscale.config.rules import violations
from mmscale.plan.compute import Flops, flops_per_token
from mmscale.plan.layouts import Layout, evaluate, fullest, recompute_label, usable_bytes
from mmscale.plan.memory import GIB, RankMemory
from mmscale.plan.parameters import count_parameters
from mmscale.tables.gpus import DEFAULT, GPUS, Gpu
from mmscale.wording import numbered

_CHUNKS = (2, 3, 4, 6)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
# Ordered from the most memory to the most recomputation.
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ("core_attn",)},
    {"recompute": "selective", "recompute_modules": ("mlp",)},
    {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
    {"recompute": "full"},
)
# Numbers of context-parallel ranks to try, and the smallest number of tokens for each of them: splitting shorter
# sequences has no benefit.
_CONTEXTS, _LEAST_PART = (1, 2, 4, 8, 16, 32, 64), 4096
# Number of layouts that are shown if none fits.
_NEAREST = 5


@dataclass
class RejectedLayouts:
    """The layouts that one rule refused.

    Attributes:
        cause: the rule's message for the first candidate that it refused.
        example: that candidate.
        count: number of candidates.
    """

    cause: str
    example: dict[str, Any]
    count: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale plan --json`."""
        return {"cause": self.cause, "example": self.example, "count": self.count}


@dataclass
class Search:
    """The result of a search.

    Attributes:
        layouts: those that fit, fastest first; if none does, the ones that are closest to fitting.
        rejected: by rule, the most frequent first.
        tried: number of candidates.
    """

    layouts: list[Layout] = field(default_factory=list)
    rejected: dict[str, RejectedLayouts] = field(default_factory=dict)
    tried: int = 0

    def reject(self, candidate: Config, world: int, cause: str, *, rule: str | None = None) -> None:
        """Count a candidate as refused by a rule: causes that differ only in numbers are one rule."""
        found = self.rejected.setdefault(
            rule or re.sub(r"\d+(\.\d+)?", "N", cause), RejectedLayouts(cause, _example(candidate, world))
        )
        found.count += 1


def search(config: Config, gpus: int, *, gpu_memory: float | None = None, gpu: Gpu | None = None) -> Search:
    """Try all layouts of a configuration on a number of devices.

    Args:
        config: the configuration; its own layout is one candidate.
        gpus: ranks, one device each.
        gpu_memory: memory of a device [GiB]; None: everything fits.
        gpu: figures of the device; None: the default one's.
    """
    gpu = gpu or GPUS[DEFAULT]
    parameters = count_parameters(config)
    flops: dict[int, Flops] = {}
    found = Search()
    too_large: list[tuple[float, Config, RankMemory]] = []

    def keep(candidate: Config, memory: RankMemory) -> None:
        size = candidate.train.micro_batch_size
        if size not in flops:
            flops[size] = flops_per_token(candidate)
        layout = evaluate(
            candidate, gpus, gpu_memory=gpu_memory, gpu=gpu, parameters=parameters, flops=flops[size], memory=memory
        )
        found.layouts.append(
            replace(
                layout, reasons=(*layout.reasons, *_other_scope(candidate, config), *_other_padding(candidate, config))
            )
        )

    for plain in _candidates(config, gpus):
        problems = violations(plain, world_size=gpus)
        if problems:
            found.tried += 1
            found.reject(plain, gpus, problems[0].cause)
            continue
        for recompute in _RECOMPUTE:
            candidate = _changed(plain, **recompute)
            found.tried += 1
            memory = fullest(candidate, gpus, parameters)
            if gpu_memory is None or memory.total <= usable_bytes(gpu_memory):
                keep(candidate, memory)
                break
            too_large.append((memory.total, candidate, memory))
            cause = f"needs {memory.total / GIB:.1f} GiB, usable are {usable_bytes(gpu_memory) / GIB:.1f}"
            found.reject(candidate, gpus, cause, rule="memory")
    if not found.layouts:
        for _, candidate, memory in sorted(too_large, key=lambda entry: entry[0])[:_NEAREST]:
            keep(candidate, memory)
    found.layouts.sort(key=lambda layout: layout.cost)
    _add_own(found, config, gpus, keep, parameters=parameters)
    found.rejected = dict(sorted(found.rejected.items(), key=lambda entry: -entry[1].count))
    return found


def is_own(layout: Layout, config: Config) -> bool:
    """Whether a layout is the configuration's own."""
    return (
        layout.config.parallel == config.parallel
        and layout.config.train.micro_batch_size == config.train.micro_batch_size
    )


def _add_own(found: Search, config: Config, gpus: int, keep: Any, *, parameters: Any) -> None:
    """Add the configuration's own layout, if it is possible: at its place by time, or last if it does not fit."""
    if any(is_own(layout, config) for layout in found.layouts) or violations(config, world_size=gpus):
        return
    keep(config, fullest(config, gpus, parameters))
    found.layouts.sort(key=lambda layout: (layout.fits is False, layout.cost))


def _divisors(number: int, limit: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0]


def _changed(config: Config, **parallel: Any) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _candidates(config: Config, world: int) -> Iterator[Config]:
    """All layouts that the numbers of heads, layers and experts allow, without recomputation."""
    model, train = config.model, config.train
    most_experts = sum(expert_counts(config).values()) or 1
    sizes = sorted({*_MICRO_BATCHES, train.micro_batch_size})
    for tp in _divisors(world, model.num_attention_heads):
        for pp in _divisors(world // tp, model.num_layers):
            for cp, ep in _shares(config, world // (tp * pp), most_experts):
                for vpp in (None, *_CHUNKS) if pp > 1 else (None,):
                    own = pp == config.parallel.pp and vpp == config.parallel.vpp
                    sends = {} if own else {"overlap_p2p": None, "batch_p2p": None, "pp_layers": None}
                    spread = _changed(config, tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp, recompute="none", **sends)
                    spread = _padded(spread)
                    for size in sizes:
                        if size == train.micro_batch_size:
                            yield spread
                        else:
                            update = {"train": train.model_copy(update={"micro_batch_size": size})}
                            yield spread.model_copy(update=update)


def _shares(config: Config, replicas: int, most_experts: int) -> Iterator[tuple[int, int]]:
    """Possible context- and expert-parallel sizes for a number of copies of the dense weights."""
    own, length = config.parallel.cp, config.model.seq_length
    for cp in sorted({own, *(size for size in _CONTEXTS if size == 1 or length // size >= _LEAST_PART)}):
        if replicas % cp == 0:
            yield from ((cp, ep) for ep in _divisors(replicas, most_experts) if ep % cp == 0 or cp % ep == 0)


def _padded(config: Config) -> Config:
    """The configuration with documents padded as its context parallelism requires."""
    multiple = math.lcm(config.data.document_multiple, 2 * config.parallel.cp if config.parallel.cp > 1 else 1)
    return config.model_copy(update={"data": config.data.model_copy(update={"document_multiple": multiple})})


def _other_padding(candidate: Config, config: Config) -> tuple[str, ...]:
    """A note if documents are padded to another multiple, because they are then packed differently."""
    multiple = candidate.data.document_multiple
    return () if multiple == config.data.document_multiple else (f"needs data.document_multiple={multiple}",)


def _other_scope(candidate: Config, config: Config) -> tuple[str, ...]:
    """A note if experts take tokens of a micro-batch of another size, which makes it another model."""
    size, own = candidate.train.micro_batch_size, config.train.micro_batch_size
    if not config.model.limits_experts or config.model.experts.scope == "sequence" or size == own:
        return ()
    return (f"experts choose among {numbered(size, 'sequence')}, not {own}",)


def _example(config: Config, world: int) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp,
        "ep": parallel.ep,
        "cp": parallel.cp,
        "dp": data_parallel_size(config, world),
        "recompute": recompute_label(config),
        "micro_batch_size": config.train.micro_batch_size,
    }
