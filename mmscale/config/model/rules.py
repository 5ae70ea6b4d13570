"""Rules about the vocabulary, the architecture and its experts.

A comment next to each rule gives its reason; file names without a path are of megatron-core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mmscale.config import derived
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

# <pad> <s> </s> <boi> <eoi>, see data/vocab.py (which imports this package, so the number is repeated here).
_SPECIAL_TOKENS = 5


_RESERVED = frozenset(
    [
        "append",
        "apply",
        "buffers",
        "children",
        "clear",
        "copy",
        "cpu",
        "cuda",
        "double",
        "eval",
        "extend",
        "fromkeys",
        "get",
        "half",
        "float",
        "forward",
        "insert",
        "items",
        "keys",
        "modules",
        "parameters",
        "pop",
        "popitem",
        "setdefault",
        "to",
        "train",
        "training",
        "type",
        "update",
        "values",
    ]
)


def _vocab(config: Config) -> Iterator[Problem]:
    modalities = config.vocab.modalities
    if not modalities:
        yield Problem("vocab.modalities is empty", "name at least a text modality with its number of ids")
        return
    if len(set(config.vocab.names)) < len(modalities):
        yield Problem(
            f"vocab.modalities: names repeat: {', '.join(config.vocab.names)}", "give each modality its own name"
        )
    for name in sorted({*config.vocab.names, *config.model.experts.counts}):
        # Names become parts of parameter names; torch refuses dots and the names of attributes of its containers.
        if "." in name or name in _RESERVED:
            yield Problem(
                f"the modality or expert group {name!r} cannot be part of a parameter's name",
                "choose a name without dots that no torch module has as an attribute, e.g. text or image",
            )
    for name in config.vocab.marked:
        if name in (modalities[0].name, "image"):
            yield Problem(
                f"vocab.modalities: {name} has marks: only modalities after the first take them, and image has its own",
                "remove marks there",
            )
    special = _SPECIAL_TOKENS + 2 * len(config.vocab.marked)
    if modalities[0].size < special:
        yield Problem(
            f"vocab.modalities.0.size: {modalities[0].name} has {modalities[0].size} ids, fewer than the "
            f"{special} special tokens that stand in the first range",
            "give the first modality more ids",
        )
    unknown = sorted(set(config.train.modality_weights) - set(config.vocab.names))
    if unknown:
        yield Problem(
            f"train.modality_weights: {', '.join(unknown)} is not in vocab.modalities "
            f"({', '.join(config.vocab.names)})",
            "use the names of vocab.modalities",
        )
    weights = [config.train.modality_weights.get(name, 1.0) for name in config.vocab.names]
    if not any(weights):
        yield Problem(
            "train.modality_weights: every modality has weight 0, nothing is learned", "give one a positive weight"
        )


def _attention(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}",
            "change one of them or set model.kv_channels",
        )
    elif model.head_dim % 2:
        yield Problem(
            f"model: the head width {model.head_dim} is odd, but rotary embedding rotates pairs of values",
            "make it even",
        )
    if heads % groups:
        yield Problem(
            f"model.num_attention_heads = {heads} is not divisible by model.num_query_groups = {groups}", "make it so"
        )
    if heads % tp:
        yield _not_divisible("model.num_attention_heads", heads, tp)
    elif groups % tp and tp % groups:
        # With fewer heads than ranks, several ranks share a head (attention.py).
        yield _not_divisible("model.num_query_groups", groups, tp)
    elif groups < tp and 2 * groups * model.head_dim % tp:
        yield _not_divisible("model: the width of all key and value heads", 2 * groups * model.head_dim, tp)


def _widths(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    if tp == 1:
        return
    if model.ffn_hidden_size % tp:
        yield _not_divisible("model.ffn_hidden_size", model.ffn_hidden_size, tp)
    shared = derived.shared_width(config)
    if shared % tp:
        yield _not_divisible("model.experts: the width of all shared experts together", shared, tp)
    if config.vocab.padded_size % tp:
        yield Problem(
            f"vocab.pad_multiple = {config.vocab.pad_multiple} pads to {config.vocab.padded_size} rows, which "
            f"parallel.tp = {tp} does not divide",
            f"make vocab.pad_multiple a multiple of {tp}",
        )
    if model.seq_length % tp:
        # Sequence parallelism is always on: without it the routers' gradients would not be reduced over TP.
        yield Problem(
            f"model.seq_length = {model.seq_length} is not divisible by parallel.tp = {tp}; above tp = 1 sequence "
            "parallelism splits every sequence over the tensor-parallel ranks",
            "change one of them",
        )


def _not_divisible(name: str, value: int, tp: int) -> Problem:
    return Problem(f"{name} = {value} is not divisible by parallel.tp = {tp}", "change one of them")


def _experts(config: Config) -> Iterator[Problem]:
    model, names = config.model, config.vocab.names
    experts = model.experts
    if not model.has_experts:
        settings = (
            ("counts", experts.counts),
            ("shared", experts.shared),
            ("noise", experts.noise != "none"),
            ("choice", experts.choice != "sigmoid"),
            ("capacity", experts.capacity != "nominal"),
        )
        for key, given in settings:
            if given:
                yield Problem(
                    f"model.experts.{key} is set, but model.kind = {model.kind} has no experts",
                    "remove it or change the kind",
                )
        return
    if not model.per_modality and len(experts.counts) != 1:
        yield Problem(
            f"model.experts.counts has {len(experts.counts)} groups, model.kind = {model.kind} wants exactly one "
            "for all modalities",
            "write for instance counts: {mixed: 8}, or use kind: moma for a group per modality",
        )
    if model.per_modality and set(experts.counts) != set(names):
        yield Problem(
            f"model.experts.counts names {', '.join(experts.counts) or 'nothing'}, model.kind = {model.kind} wants one "
            f"group for each of vocab.modalities: {', '.join(names)}",
            "give every modality its number of experts",
        )
    total = sum(experts.counts.values())
    if 0 < total < config.parallel.ep:
        yield Problem(
            f"model.experts.counts has {total} experts altogether, fewer than parallel.ep = {config.parallel.ep}: a "
            "rank would hold none",
            "use parallel.ep of at most that",
        )


def _capacity(config: Config) -> Iterator[Problem]:
    model, experts, names = config.model, config.model.experts, config.vocab.names
    if experts.share != "auto":
        if set(experts.share) != set(names):
            yield Problem(
                f"model.experts.share names {', '.join(experts.share) or 'nothing'}, vocab.modalities has "
                f"{', '.join(names)}",
                "give every modality its share, or write auto",
            )
        elif not math.isclose(sum(experts.share.values()), 1.0, abs_tol=1e-6):
            yield Problem(
                f"model.experts.share sums to {sum(experts.share.values()):g}, not to 1", "make the shares sum to 1"
            )
    if not model.has_experts:
        return
    scope = model.seq_length * (config.train.micro_batch_size if experts.scope == "micro_batch" else 1)
    if experts.capacity_multiple > scope:
        yield Problem(
            f"model.experts.capacity_multiple = {experts.capacity_multiple} is more than the {scope} tokens an expert "
            "chooses from",
            "lower it",
        )
    for name, count in experts.counts.items():
        share = experts.share.get(name, 1.0) if model.per_modality and experts.share != "auto" else 1.0
        if experts.capacity == "actual":
            continue  # capped at all tokens of the group
        if model.per_modality and experts.share == "auto":
            continue  # unknown until the data is known
        wanted = experts.capacity_factor * share / count
        if wanted > 1.0:
            yield Problem(
                f"model.experts: capacity_factor {experts.capacity_factor:g} * share {share:g} / {count} experts of "
                f"{name} = {wanted:g}: each expert would take more tokens than there are",
                "lower model.experts.capacity_factor",
            )


def _depth(config: Config) -> Iterator[Problem]:
    depth, tp = config.model.depth, config.parallel.tp
    if depth is None:
        return
    if depth.multiple % tp:
        # Rounding the selection to TP itself would make the loss depend on the layout.
        yield Problem(
            f"model.depth.multiple = {depth.multiple} is not divisible by parallel.tp = {tp}; the selected tokens are "
            "split over the tensor-parallel ranks",
            f"make model.depth.multiple a multiple of {tp}",
        )
    if depth.multiple > config.model.seq_length:
        yield Problem(
            f"model.depth.multiple = {depth.multiple} is more than model.seq_length = {config.model.seq_length}: a "
            "layer would have to select more tokens than there are",
            "lower model.depth.multiple",
        )


def _untied(config: Config) -> Iterator[Problem]:
    model, untie = config.model, config.model.untie
    if not untie:
        return
    if len(set(untie)) < len(untie):
        yield Problem(f"model.untie names a part twice: {', '.join(untie)}", "name each part once")
    if len(config.vocab.names) < 2:
        yield Problem(
            f"model.untie = [{', '.join(untie)}] with one modality: there are no other tokens to separate it from",
            "remove it, or use a vocabulary of several modalities",
        )
    if "ffn" in untie and model.has_experts:
        yield Problem(
            f"model.untie names ffn, but the feed-forward layers of model.kind = {model.kind} are experts",
            "use model.kind=dense, or remove ffn from model.untie",
        )
    if "attention" in untie and model.qkv_bias:
        yield Problem(
            "model.untie names attention, whose untied projections have no biases, but model.qkv_bias is set",
            "remove one of them",
        )
    if model.backend == "te":
        yield Problem(
            "model.untie with model.backend = te: untied weights are implemented for the torch backend only",
            "use model.backend=auto or torch",
        )
    if config.precision.fp8 != "off":
        yield Problem(
            f"model.untie with precision.fp8 = {config.precision.fp8}: untied weights are not quantized",
            "use precision.fp8=off",
        )
    if config.parallel.overlap_tensor:
        yield Problem(
            "model.untie with parallel.overlap_tensor: the overlap is part of Transformer-Engine's linears",
            "use parallel.overlap_tensor=false",
        )


def _dropout(config: Config) -> Iterator[Problem]:
    if config.model.dropout >= 1.0:
        yield Problem(
            "model.dropout = 1 drops every output of attention and FFN: their weights get no gradient",
            "use a value below 1",
        )


def _rope(config: Config) -> Iterator[Problem]:
    scaling, base = config.model.rope_scaling, config.model.rope_base
    if base != int(base):
        # GPTModel takes rotary_base as an int.
        yield Problem(
            f"model.rope_base = {base:.12g} is not a whole number, the only kind that megatron-core takes",
            f"set it to {int(base)} or {int(base) + 1}",
        )
    if scaling is None:
        return
    if scaling.rope_type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        # Angles are interpolated between the two limits, which must therefore differ.
        yield Problem(
            f"model.rope_scaling.high_freq_factor = {scaling.high_freq_factor:g} is not above low_freq_factor = "
            f"{scaling.low_freq_factor:g}",
            "Llama 3.1 has 4 and 1",
        )
    if scaling.rope_type == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        yield Problem(
            f"model.rope_scaling.beta_fast = {scaling.beta_fast:g} is not above beta_slow = {scaling.beta_slow:g}",
            "YaRN has 32 and 1",
        )
    if scaling.rope_type == "yarn" and base < 2:
        # The formula divides by the base's logarithm.
        yield Problem(f"model.rope_base = {base:g} with YaRN: all angles are equal", "raise model.rope_base")


RULES: tuple[Rule, ...] = (
    _rope,
    _dropout,
    _vocab,
    _attention,
    _widths,
    _experts,
    _capacity,
    _depth,
    _untied,
)
