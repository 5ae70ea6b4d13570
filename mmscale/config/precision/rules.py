"""Rules about number formats: FP8 recipes and the shapes of their products.

A comment next to each rule gives its reason; file names without a path are of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import derived
from mmscale.config.precision.fp8 import BLOCK, alignment, blocks_are_gathered, row_multiple
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

_LARGEST_MARGIN = 8  # 448 / 2^8 = 1.75: a larger margin would waste e4m3's range


def _recipe(config: Config) -> Iterator[Problem]:
    precision, layers = config.precision, config.model.num_layers
    first, last = precision.fp8_skip_first, precision.fp8_skip_last
    if precision.fp8 == "off":
        for key, given in (
            ("fp8_emulate", precision.fp8_emulate),
            ("fp8_skip_first", first),
            ("fp8_skip_last", last),
        ):
            if given:
                yield Problem(f"precision.{key} is set, but precision.fp8 = off", "choose a recipe or remove it")
        return
    if precision.fp8 == "delayed" and (first or last):
        # All layers run in one FP8 context, at whose end all amax values are reduced together (fp8_utils.py).
        yield Problem(
            "precision.fp8_skip_first and fp8_skip_last do not go with precision.fp8 = delayed: all layers agree on "
            "their scales at once",
            "use precision.fp8=tensorwise or blockwise, or remove them",
        )
    elif first + last >= layers:
        yield Problem(
            f"precision.fp8_skip_first + fp8_skip_last = {first} + {last} leave no layer in FP8 of {layers}",
            "lower them, or set precision.fp8=off",
        )
    for key, count in (("fp8_skip_first", first), ("fp8_skip_last", last)):
        if count > layers // config.parallel.pp:
            yield Problem(  # transformer_config.py
                f"precision.{key} = {count} is more than the {layers // config.parallel.pp} layers of a pipeline stage",
                "lower it",
            )
    if precision.fp8 == "nvfp4" and not precision.fp8_emulate and precision.dtype == "fp32":
        yield Problem(  # the rotation's kernel takes bf16 only
            "precision.fp8 = nvfp4 with precision.dtype = fp32: Transformer-Engine's Hadamard rotation takes bf16",
            "use precision.dtype=bf16, or precision.fp8_emulate=true",
        )
    standard = precision.fp4_stochastic_rounding and precision.fp4_hadamard
    if precision.fp8 == "nvfp4" and not precision.fp8_emulate and not standard:
        yield Problem(  # fp4_utils.py: NVFP4BlockScaling() without arguments
            "precision.fp4_stochastic_rounding and fp4_hadamard cannot be switched off for Transformer-Engine's "
            "kernels: megatron-core takes the recipe as it is",
            "leave them on, or set precision.fp8_emulate=true",
        )
    if precision.fp8_margin > _LARGEST_MARGIN:
        yield Problem(
            f"precision.fp8_margin = {precision.fp8_margin}: scales would be 2^{precision.fp8_margin} times too small",
            f"use at most {_LARGEST_MARGIN}; 0 is usual",
        )


def _kernels(config: Config) -> Iterator[Problem]:
    """Without Transformer-Engine's kernels megatron-core would silently train in bf16 (fp8_utils.py)."""
    model, precision = config.model, config.precision
    if precision.fp8 == "off":
        return
    compute = model.experts.compute if model.has_experts else "auto"
    if precision.fp8_emulate:
        if model.backend == "te":
            yield Problem(
                "precision.fp8_emulate with model.backend = te: emulation rounds what torch multiplies",
                "use model.backend=torch or auto, or precision.fp8_emulate=false",
            )
        if compute not in ("auto", "bmm") or model.experts.cuda_graph:
            yield Problem(
                "precision.fp8_emulate with model.experts.compute or cuda_graph: the experts' products are "
                "emulated too",
                "use model.experts.compute=auto and model.experts.cuda_graph=false",
            )
        return
    if model.backend == "torch":
        yield Problem(
            f"precision.fp8 = {precision.fp8} with model.backend = torch: only Transformer-Engine has FP8 kernels",
            "use model.backend=te or auto, or precision.fp8_emulate=true to study what FP8 does to the loss",
        )
    if compute in ("bmm", "grouped_mm"):
        yield Problem(
            f"precision.fp8 = {precision.fp8} with model.experts.compute = {compute}: the experts, most of the FLOPs, "
            "would stay in bf16",
            "use model.experts.compute=auto or te",
        )


def _shapes(config: Config) -> Iterator[Problem]:
    if config.precision.fp8 == "off":
        return
    model, tp, gathered = config.model, config.parallel.tp, blocks_are_gathered(config)
    heads, whole = model.num_attention_heads, alignment(config)
    widths = [
        ("model.hidden_size", model.hidden_size, BLOCK if gathered else whole),
        ("queries, keys and values", (heads + 2 * model.query_groups) * model.head_dim // tp, whole),
        ("attention's output", heads * model.head_dim // tp, whole),
        ("model.ffn_hidden_size", model.ffn_hidden_size // tp, whole),
    ]
    if derived.shared_width(config):
        widths.append(("all shared experts together", derived.shared_width(config) // tp, whole))
    for name, width, multiple in widths:
        if width % multiple:
            yield Problem(
                f"{_recipe_of(config)}: the width of {name}, {width} on a rank, is not a multiple of {multiple}",
                "make it one",
            )
    rows = row_multiple(config)
    if model.seq_length % rows:
        yield Problem(
            f"{_recipe_of(config)}: model.seq_length = {model.seq_length} is not a multiple of {rows}", "make it one"
        )
        return
    tokens = [("model.seq_length", model.seq_length)]
    if model.depth is not None:
        tokens.append(("the tokens that a Mixture-of-Depths layer selects", derived.depth_tokens(config)))
    for name, count in tokens:
        local = count // tp * config.train.micro_batch_size
        if local % rows:
            yield Problem(
                f"{_recipe_of(config)}: {name} = {count}, of which a rank holds {count // tp} * micro-batches of "
                f"{config.train.micro_batch_size} = {local} rows, no multiple of {rows}",
                f"make it a multiple of {rows * tp}",
            )


def _recipe_of(config: Config) -> str:
    text = f"precision.fp8 = {config.precision.fp8}"
    return f"{text} with parallel.tp = {config.parallel.tp}" if blocks_are_gathered(config) else text


RULES: tuple[Rule, ...] = (_recipe, _kernels, _shapes)
