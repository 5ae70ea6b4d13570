"""Rules about the architecture.

A comment next to each rule gives its reason; file names without a path are of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import derived
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config


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
    yield from _frozen_in_fp8(config)
    if config.parallel.overlap_tensor:
        yield Problem(
            "model.untie with parallel.overlap_tensor: the overlap is part of Transformer-Engine's linears",
            "use parallel.overlap_tensor=false",
        )


def _frozen_in_fp8(config: Config) -> Iterator[Problem]:
    """One grouped product has all modalities' weights, and computes the gradients of all if its first has one."""
    if config.precision.fp8 == "off" or config.precision.emulated:
        return
    for part in ("attention", "ffn"):
        frozen = [name for name in config.vocab.names if {name, f"{name}.{part}"} & set(config.optim.freeze)]
        if part in config.model.untie and 0 < len(frozen) < len(config.vocab.names):
            yield Problem(
                f"optim.freeze names {', '.join(frozen)}, whose {part} is untied, with precision.fp8 = "
                f"{config.precision.fp8}: Transformer-Engine's grouped product trains the weights of all modalities "
                "or of none",
                "use precision.fp8=off or precision.fp8_emulate=true, or freeze other parts, such as "
                f"{frozen[0]}.norms",
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
    _attention,
    _widths,
    _depth,
    _untied,
)
