"""Rules about the computation of experts and about overlap (`model.experts`, `parallel.overlap_*`).

These rules hold on every machine. Whether this machine supports a setting is checked when the model is built.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

# grouped_mm refuses matrices whose rows do not start at multiples of this [bytes] (aten/native/GroupedMMUtils.h).
_ROW_BYTES = 16


def _grouped(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    if not model.has_experts or model.experts.compute != "grouped_mm":
        return
    multiple = _ROW_BYTES // (2 if config.precision.dtype == "bf16" else 4)
    for key, width in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size / parallel.tp", model.ffn_hidden_size // tp),
    ):
        if width % multiple:
            yield Problem(
                f"model.experts.compute = grouped_mm: {key} = {width} is not a multiple of {multiple}, and its "
                f"kernels need rows of a multiple of {_ROW_BYTES} bytes",
                f"make it a multiple of {multiple}, or use model.experts.compute=bmm",
            )


def _graphs(config: Config) -> Iterator[Problem]:
    parallel, experts = config.parallel, config.model.experts
    if not experts.cuda_graph:
        return
    if not config.model.has_experts:
        yield Problem(
            f"model.experts.cuda_graph is set, but model.kind = {config.model.kind} has no experts", "remove it"
        )
    if experts.capacity == "actual":
        yield Problem(
            "model.experts.cuda_graph with model.experts.capacity = actual: a graph replays the shapes that it was "
            "captured with, and these capacities change with every micro-batch",
            "use model.experts.capacity=nominal or model.experts.cuda_graph=false",
        )
    if parallel.pp > 1:
        yield Problem(
            f"model.experts.cuda_graph with parallel.pp = {parallel.pp}: a graph keeps the activations of one "
            "micro-batch, and a pipeline stage has several in flight",
            "use parallel.pp=1 or model.experts.cuda_graph=false",
        )
    if parallel.recompute == "full":
        yield Problem(
            "model.experts.cuda_graph with parallel.recompute = full: graphs keep their activations permanently, so "
            "recomputing layers would save no memory",
            "use parallel.recompute=selective or none, or model.experts.cuda_graph=false",
        )
    why = "Transformer-Engine's modules update FP8 state between micro-batches, which a captured graph would repeat"
    fp8 = config.precision.fp8
    if experts.compute == "te":
        yield Problem(
            f"model.experts.cuda_graph with model.experts.compute = te: {why}",
            "use model.experts.compute=bmm or grouped_mm, or model.experts.cuda_graph=false",
        )
    elif experts.compute == "auto" and fp8 != "off" and not config.precision.emulated:
        yield Problem(
            f"model.experts.cuda_graph with precision.fp8 = {fp8}, for which Transformer-Engine computes the experts: "
            f"{why}",
            "use model.experts.cuda_graph=false or precision.fp8=off",
        )


def _overlap(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        yield Problem(
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce: both work on the same buckets",
            "set parallel.overlap_grad_reduce=true",
        )
    if parallel.overlap_experts and parallel.ep == 1:
        yield Problem(
            "parallel.overlap_experts is set, but with parallel.ep = 1 no tokens are exchanged",
            "set parallel.ep or drop parallel.overlap_experts",
        )


def _user_buffers(config: Config) -> Iterator[Problem]:
    """Limits of Transformer-Engine's user buffers (transformer_engine/pytorch/module/base.py)."""
    parallel, model, precision = config.parallel, config.model, config.precision
    if not parallel.overlap_tensor:
        return
    if parallel.tp == 1:
        yield Problem(
            "parallel.overlap_tensor is set, but with parallel.tp = 1 there are no tensor-parallel messages",
            "set parallel.tp or drop parallel.overlap_tensor",
        )
    if model.backend == "torch":
        yield Problem(
            "parallel.overlap_tensor with model.backend = torch: the user buffers are Transformer-Engine's",
            "use model.backend=te or drop parallel.overlap_tensor",
        )
    elif precision.emulated:
        yield Problem(
            "parallel.overlap_tensor with precision.fp8_emulate: emulation runs in torch, and the user buffers are "
            "Transformer-Engine's",
            "drop one of them",
        )
    if precision.dtype == "fp32":
        yield Problem(
            "parallel.overlap_tensor with precision.dtype = fp32: user buffers hold bf16 or FP8",
            "use precision.dtype=bf16 or drop parallel.overlap_tensor",
        )
    if precision.fp8 == "blockwise":
        yield Problem(
            "parallel.overlap_tensor with precision.fp8 = blockwise: user buffers carry no scales of blocks",
            "use precision.fp8=tensorwise or delayed, or drop parallel.overlap_tensor",
        )
    if model.depth is not None:
        yield Problem(
            "parallel.overlap_tensor with model.depth: user buffers have one shape for all layers, and "
            "Mixture-of-Depths layers send fewer tokens",
            "drop one of them",
        )


RULES: tuple[Rule, ...] = (_grouped, _graphs, _overlap, _user_buffers)
