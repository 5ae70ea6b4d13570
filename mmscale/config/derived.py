"""Values computed from a configuration: micro-batches, capacities of experts and depth layers, placement of experts.

Model, plan, data and checks share these definitions. Validation is in rules.py. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from mmscale.config.optim.schema import OptimConfig
from mmscale.config.parallel.schema import ParallelConfig
from mmscale.config.precision.fp8 import depth_multiple, high_precision
from mmscale.config.schema import Config
from mmscale.tables.routings import measured_routings
from mmscale.tables.settings import OPTIMIZERS


def data_parallel_size(config: Config, world: int) -> int:
    """Replicas that read different micro-batches: world / (TP * PP * CP) [ranks]."""
    return world // (config.parallel.tp * config.parallel.pp * config.parallel.cp)


def dense_replicas(config: Config, world: int) -> int:
    """Copies of each dense weight: the context-parallel ranks of all data-parallel replicas, world / (TP * PP) [ranks].

    They sum gradients and share the optimizer's state, and experts are distributed over them.
    """
    return world // (config.parallel.tp * config.parallel.pp)


def least_ranks(config: Config) -> int:
    """The smallest possible world size of the layout [ranks]."""
    parallel = config.parallel
    return parallel.tp * parallel.pp * math.lcm(parallel.cp, parallel.ep)


def global_micro_batches(config: Config) -> int:
    """Micro-batches of one optimizer step, over all replicas."""
    return config.train.global_batch_size // config.train.micro_batch_size


def micro_batches_per_step(config: Config, world: int) -> int:
    """Micro-batches that each replica runs in one optimizer step."""
    return global_micro_batches(config) // data_parallel_size(config, world)


def tokens_per_step(config: Config) -> int:
    """Tokens of one optimizer step, over all ranks [tokens]."""
    return config.train.global_batch_size * config.model.seq_length


def blend_phases(config: Config) -> list[tuple[int, tuple[float, ...]]]:
    """Steps at which the weights of the data sets change, the first one 0, with the weights; empty without data.

    The mixing temperature is already applied.
    """
    sources = config.data.sources
    steps = {step for one in sources if isinstance(one.weight, dict) for step in one.weight}
    found: list[tuple[int, tuple[float, ...]]] = []
    for step in sorted({0} | steps) if sources else ():
        weights = _tempered([one.weight_at(step) for one in sources], config.data.temperature)
        if not found or found[-1][1] != weights:
            found.append((step, weights))
    return found


def _tempered(weights: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Weights to the power of 1 / temperature; relative to the largest one if a float could not represent them."""
    power = 1.0 / temperature
    try:
        found = tuple(one**power for one in weights)
    except OverflowError:
        found = (math.inf,)
    if math.isfinite(sum(found)) and any(found) == any(weights):
        return found
    return tuple((one / max(weights)) ** power for one in weights)


def first_weights(config: Config) -> list[float]:
    """Weights of the data sets at the run's beginning."""
    return [weight for _, weights in blend_phases(config)[:1] for weight in weights]


def mean_shares(config: Config) -> list[float]:
    """Share of each data set in the sequences of the whole run."""
    phases, steps = blend_phases(config), max(1, config.train.steps)
    ends = [min(start, steps) for start, _ in phases[1:]] + [steps]
    found = [0.0] * len(config.data.sources)
    for (start, weights), end in zip(phases, ends, strict=True):
        for number, weight in enumerate(weights):
            found[number] += max(0, end - start) / steps * weight / sum(weights)
    return found


def sends_keys_around(config: Config) -> bool:
    """Whether context-parallel ranks exchange keys and values in a ring."""
    return config.parallel.cp > 1 and config.parallel.cp_attention == "ring"


def depth_tokens(config: Config) -> int:
    """Tokens of each sequence that a Mixture-of-Depths layer processes [tokens].

    Rounded up to `model.depth.multiple` (or FP8's multiple), a constant of the configuration: rounding to TP instead
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
        multiple: `capacity_multiple` of mmscale.config.precision.fp8 [tokens].
        limit: tokens in scope; no expert can take more [tokens].
    """
    # 1e-9: a product like 0.1 * 3 / 0.3, which is an integer up to rounding, must not be rounded up to the next one.
    tokens = math.ceil(factor * tokens_in_scope * share / experts - 1e-9)
    return min(limit, max(1, math.ceil(tokens / multiple) * multiple))


def slots_of_token(config: Config) -> float:
    """Slots of a group's experts together per token of the group, before rounding.

    The capacity factor; with token choice that of the experts that a token chooses, each of which has a slot for it if
    there is no limit.
    """
    experts = config.model.experts
    if experts.token_choice is None:
        return experts.capacity_factor
    limit = experts.token_choice.capacity_factor
    return experts.token_choice.top_k * (1.0 if limit is None else limit)


def chunk_layers(config: Config) -> list[range]:
    """Layers (from 0) of every pipeline chunk, in the model's order; chunk c of stage s is number c * pp + s."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pp * (parallel.vpp or 1)
    sizes = parallel.pp_layers or (layers // chunks,) * chunks
    ends = list(accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def experts_of_ranks(counts: Mapping[str, int], ranks: int) -> dict[str, tuple[range, ...]]:
    """The experts of each group that every expert-parallel rank holds: contiguous ranges, in rank order.

    Each rank holds n // ranks experts of a group of n, and n % ranks ranks hold one more. The ranks with one more are
    those after the ranks that had one more in the preceding groups. So all ranks hold the same total number of experts
    whenever the total is divisible: 7 text experts and 1 image expert are 2 on each of 4 ranks.

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


class GroupSize(NamedTuple):
    """A group of experts.

    Attributes:
        name: of its modality, or of the mixed group.
        modalities: indices of the modalities whose tokens it takes.
        experts: their number.
    """

    name: str
    modalities: tuple[int, ...]
    experts: int


def expert_groups(config: Config) -> tuple[GroupSize, ...]:
    """Groups of experts with routers, in the order that model, checkpoints and plan use; empty for a dense model.

    The order is the vocabulary's, whatever the order in the file.
    """
    return tuple(group for group in _all_groups(config) if group.name not in config.model.experts.ungated)


def ungated_groups(config: Config) -> tuple[GroupSize, ...]:
    """The groups of one expert without a router (`model.experts.ungated`), in the vocabulary's order."""
    return tuple(group for group in _all_groups(config) if group.name in config.model.experts.ungated)


def _all_groups(config: Config) -> tuple[GroupSize, ...]:
    model, names = config.model, config.vocab.names
    counts = model.experts.counts
    if not model.has_experts:
        return ()
    if not model.per_modality:
        return tuple(GroupSize(name, tuple(range(len(names))), count) for name, count in counts.items())
    return tuple(GroupSize(name, (index,), counts[name]) for index, name in enumerate(names) if name in counts)


def expert_counts(config: Config) -> dict[str, int]:
    """Experts of each group with a router, in the order of `expert_groups`."""
    return {group.name: group.experts for group in expert_groups(config)}


def on_fullest_rank(config: Config, of_groups: Mapping[str, float]) -> float:
    """The largest amount of a quantity on any expert-parallel rank, if the experts of a group share it equally.

    If expert parallelism divides every group, it is the sum over groups divided by the ranks.

    Args:
        config: gives groups and ranks.
        of_groups: the total of each group, e.g. its parameters; of a group that is missing there is none.
    """
    counts, ranks = expert_counts(config), config.parallel.ep
    if not any(count % ranks for count in counts.values()):
        return sum(of_groups.values()) / ranks
    places = experts_of_ranks(counts, ranks)
    shares = [
        sum(amount * len(places[name][rank]) / counts[name] for name, amount in of_groups.items())
        for rank in range(ranks)
    ]
    return max(shares)


def shared_width(config: Config) -> int:
    """SwiGLU width of all shared experts together; they see every token, so one wide expert computes the same."""
    experts = config.model.experts
    return experts.shared * (experts.shared_ffn_hidden_size or config.model.ffn_hidden_size)


def with_auxiliary_routers(config: Config) -> Config:
    """The configuration of a model with auxiliary routers, for the stage that trains them and for inference.

    FP8 is off, because its scales belong to training steps; slots stay rounded as under FP8.
    """
    config = high_precision(config)
    if config.model.auxiliary.mode != "off":
        return config
    auxiliary = config.model.auxiliary.model_copy(update={"mode": "stage"})
    return config.model_copy(update={"model": config.model.model_copy(update={"auxiliary": auxiliary})})


def for_inference(config: Config, *, tp: int = 1) -> Config:
    """The same model for any machine: without the layout and the backend that a run was trained with.

    Args:
        config: the run's configuration.
        tp: tensor-parallel ranks of the inference [ranks].
    """
    config = high_precision(config)  # before the layout is changed, because it affects the rounding of slots
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


BITS = "bits_per_byte/"  # prefix of the names of values per byte of held-out text
CONDITIONAL = "conditional_loss/"  # prefix of the losses of one modality given another, e.g. text_given_image
SOURCE = "source/"  # prefix of the names of values of one source of a blend


def source_names(config: Config) -> dict[str, str]:
    """Folders of a blend's data sets by name; empty without a blend, because all values are those of the one set.

    A name is the folder's, preceded by as many of its parents (`a.web`, `b.web`) as distinguish it from the others.
    """
    # normpath removes ".."; `Path.resolve` would also follow links, on which a name should not depend.
    folders = {Path(os.path.normpath(Path(source.path).absolute())): source.path for source in config.data.sources}
    if len(folders) < 2:
        return {}
    names: list[str] = []
    for parents in range(1, 1 + max(len(folder.parts) for folder in folders)):
        names = [".".join(folder.parts[1:][-parents:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders.values(), strict=True))


def held_out_figures(config: Config) -> list[str]:
    """Losses that evaluations of a run measure, by their names in metrics.jsonl (mmscale.runs.held_out.HeldOut)."""
    routings = ["" if routing.leaks else f"{routing}/" for routing in measured_routings(config.model)]
    sets = ["", *(f"validation/{name}/" for name in config.data.validation)]
    if config.train.eval_sources:
        sets += [f"{SOURCE}{name}/" for name in source_names(config)]
    figures = ["loss", *(f"loss/{name}" for name in config.vocab.names)]
    return [f"eval/{one}{routing}{figure}" for one in sets for routing in routings for figure in figures]


def data_seed(config: Config) -> int:
    """Seed of the order of training documents."""
    return config.run.seed if config.data.seed is None else config.data.seed


def overlap_p2p(config: Config) -> bool:
    """Whether pipeline sends overlap with compute; by default with an interleaved schedule."""
    chosen = config.parallel.overlap_p2p
    return config.parallel.vpp is not None if chosen is None else chosen


def batch_p2p(config: Config) -> bool:
    """Whether pipeline sends and receives are batched; by default if they do not overlap with compute."""
    chosen = config.parallel.batch_p2p
    return not overlap_p2p(config) if chosen is None else chosen


def orthogonalizes(optim: OptimConfig) -> bool:
    """Whether Muon updates the matrices of hidden layers."""
    return optim.optimizer in OPTIMIZERS and OPTIMIZERS[optim.optimizer].orthogonal


def overlap_data_parallel(config: Config, *, nccl: bool) -> tuple[bool, bool]:
    """Whether gradients are reduced during backward, and parameters gathered during forward.

    By default both are on with NCCL. On gloo the same cores compute and send, so nothing is gained, and steps without
    overlap are easier to follow.

    Args:
        config: gives `parallel.overlap_grad_reduce` and `overlap_param_gather`.
        nccl: whether ranks communicate through NCCL.
    """
    reduce, gather = config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather
    if reduce is None:
        reduce = nccl or bool(gather)
    return reduce, reduce if gather is None and nccl else bool(gather)
