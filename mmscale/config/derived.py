"""Numbers that follow from a configuration: portions of a batch, capacities of experts and of depth layers.

One definition for model, plan, data and checks. Nothing is validated here (rules.py does that), nothing imports torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from itertools import accumulate

from mmscale.config.fp8 import depth_multiple, high_precision
from mmscale.config.schema import Config, ParallelConfig


def data_parallel_size(config: Config, world: int) -> int:
    """Model replicas that `world` ranks hold: what tensor and pipeline parallelism leave over [ranks]."""
    return world // (config.parallel.tp * config.parallel.pp)


def global_micro_batches(config: Config) -> int:
    """Micro-batches of one optimizer step, over all replicas."""
    return config.train.global_batch_size // config.train.micro_batch_size


def micro_batches_per_step(config: Config, world: int) -> int:
    """Micro-batches that each replica runs in one optimizer step."""
    return global_micro_batches(config) // data_parallel_size(config, world)


def tokens_per_step(config: Config) -> int:
    """Tokens of one optimizer step, over all ranks [tokens]."""
    return config.train.global_batch_size * config.model.seq_length


def depth_tokens(config: Config) -> int:
    """Tokens of each sequence that a Mixture-of-Depths layer processes [tokens].

    Rounded up to `model.depth.multiple` (and what FP8 wants), a constant of the configuration: rounding to TP instead
    would make the selection, and so the loss, depend on the layout. Without Mixture-of-Depths it is the whole sequence.
    """
    depth, length = config.model.depth, config.model.seq_length
    if depth is None:
        return length
    multiple = depth_multiple(config)
    return min(length, math.ceil(depth.capacity * length / multiple) * multiple)


def expert_capacity(
    tokens_in_scope: int, share: float, experts: int, *, factor: float, multiple: int, limit: int
) -> int:
    """Tokens that each expert of a group takes.

    min(limit, max(1, ceil(ceil(factor * N * share / E) / multiple) * multiple)). A host integer that follows from
    nominal shares only, so it is the same on every expert-parallel rank: the all-to-all has equal splits and needs no
    exchange of counts. Slots that a batch's modality mix leaves empty are masked.

    Args:
        tokens_in_scope: N, tokens of all modalities among which the expert chooses (a sequence or a micro-batch)
            [tokens].
        share: nominal share of the group's modality in those tokens; 1 for a group that sees every token.
        experts: E, experts of the group over all expert-parallel ranks.
        factor: model.experts.capacity_factor.
        multiple: `capacity_multiple` of mmscale.config.fp8 [tokens].
        limit: tokens in scope; no expert can take more [tokens].
    """
    # 1e-9: 0.1 * 3 / 0.3-like products that are whole on paper must not be rounded up to the next token.
    tokens = math.ceil(factor * tokens_in_scope * share / experts - 1e-9)
    return min(limit, max(1, math.ceil(tokens / multiple) * multiple))


def chunk_layers(config: Config) -> list[range]:
    """Layers (from 0) of every pipeline chunk, in the model's order; chunk c of stage s is number c * pp + s."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pp * (parallel.vpp or 1)
    sizes = parallel.pp_layers or (layers // chunks,) * chunks
    ends = list(accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def experts_of_ranks(counts: Mapping[str, int], ranks: int) -> dict[str, tuple[range, ...]]:
    """Which experts of each group every expert-parallel rank holds: contiguous ranges, in the order of ranks.

    Ranks hold equally many experts of a group, or one more where the group's number is not divisible. Those one-more go
    to the ranks that follow the ones that had them in the groups before, so ranks hold equally many experts altogether
    wherever the total allows it: 7 text experts and 1 image expert are 2 on each of 4 ranks.

    Args:
        counts: experts of each group, in the groups' order.
        ranks: expert-parallel ranks.
    """
    return dict(zip(counts, _spread(tuple(counts.values()), ranks), strict=True))


@functools.lru_cache
def _spread(counts: tuple[int, ...], ranks: int) -> list[tuple[range, ...]]:
    found, turn = [], 0
    for count in counts:
        least, more = divmod(count, ranks)
        ends = list(accumulate(least + ((rank - turn) % ranks < more) for rank in range(ranks)))
        found.append(tuple(range(first, end) for first, end in zip([0, *ends], ends, strict=False)))
        turn += more
    return found


def expert_counts(config: Config) -> dict[str, int]:
    """Experts of each group, in the order that model, checkpoints and plan share."""
    counts = config.model.experts.counts
    if config.model.kind != "moma":
        return dict(counts)
    return {name: counts[name] for name in config.vocab.names if name in counts}


def on_fullest_rank(config: Config, of_groups: Mapping[str, float]) -> float:
    """What the expert-parallel rank with the most of it has of something that each group's experts share equally.

    With groups that expert parallelism divides it is the sum over groups divided by the ranks.

    Args:
        config: gives groups and ranks.
        of_groups: the whole of each group, e.g. its parameters.
    """
    counts, ranks = expert_counts(config), config.parallel.ep
    if not any(count % ranks for count in counts.values()):
        return sum(of_groups.values()) / ranks
    places = experts_of_ranks(counts, ranks)
    shares = [sum(of_groups[name] * len(places[name][rank]) / counts[name] for name in counts) for rank in range(ranks)]
    return max(shares)


def shared_width(config: Config) -> int:
    """SwiGLU width of all shared experts together; they see every token, so one wide expert computes the same."""
    experts = config.model.experts
    return experts.shared * (experts.shared_ffn_hidden_size or config.model.ffn_hidden_size)


def with_auxiliary_routers(config: Config) -> Config:
    """The configuration whose model holds auxiliary routers, as the stage that trains them and inference build it.

    Without FP8, whose scales belong to training steps; the slots that it rounded stay.
    """
    config = high_precision(config)
    if config.model.auxiliary.mode != "off":
        return config
    auxiliary = config.model.auxiliary.model_copy(update={"mode": "stage"})
    return config.model_copy(update={"model": config.model.model_copy(update={"auxiliary": auxiliary})})


def for_inference(config: Config, *, tp: int = 1) -> Config:
    """The same model on any machine: nothing is left of the layout and the machine that a run was trained on.

    Args:
        config: the run's configuration.
        tp: tensor-parallel ranks that share the model [ranks].
    """
    config = high_precision(config)  # slots are rounded for the run's layout, so before it is left
    model = config.model
    experts = model.experts.model_copy(update={"compute": "auto", "cuda_graph": False})
    anywhere = {
        "backend": "auto" if model.backend == "te" else model.backend,
        "gradient_accumulation_fusion": "off",  # there are no gradients
        "experts": experts,
    }
    return config.model_copy(
        update={"model": model.model_copy(update=anywhere), "parallel": ParallelConfig(tp=tp)},
    )


def overlap_p2p(config: Config) -> bool:
    """Whether pipeline sends overlap with compute; left open, it follows from interleaving."""
    chosen = config.parallel.overlap_p2p
    return config.parallel.vpp is not None if chosen is None else chosen


def batch_p2p(config: Config) -> bool:
    """Whether pipeline sends and receives are batched; left open, they are when they do not overlap with compute."""
    chosen = config.parallel.batch_p2p
    return not overlap_p2p(config) if chosen is None else chosen


def overlap_data_parallel(config: Config, *, nccl: bool) -> tuple[bool, bool]:
    """Whether gradients are reduced during backward, and parameters gathered during forward.

    Left open, both are where ranks talk through NCCL. On gloo the same cores compute and send: nothing is gained, and
    a step in one order is easier to follow.

    Args:
        config: gives `parallel.overlap_grad_reduce` and `overlap_param_gather`.
        nccl: whether ranks talk through NCCL.
    """
    reduce, gather = config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather
    if reduce is None:
        reduce = nccl or bool(gather)
    return reduce, reduce if gather is None and nccl else bool(gather)
