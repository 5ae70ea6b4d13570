"""Measurements 1, 2, 3 and 5 of `mmscale bench gpu`: ceilings, expert networks in bf16 and FP8, routing.

Shapes: E experts, C tokens of each, H hidden width, F inner width, T tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.bench import experts
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import Ceilings
from mmscale.model.build import transformer_config
from mmscale.model.capacity import Slots
from mmscale.model.expert_compute import ExpertCompute, Products
from mmscale.model.routing import combine, expert_choice
from mmscale.runtime import device, groups, transformer_engine

RECIPES = ("delayed", "tensorwise", "blockwise")
_ROTATED = 4  # number of inputs between which calls alternate
# Names of the rows, by the ways of `mmscale bench experts`.
_WAYS = {
    experts.LOOP: "loop",
    experts.BASE: "bmm",
    "bmm_fused": "bmm, fused SwiGLU",
    "grouped_mm_fused": "grouped_mm, fused SwiGLU",
}


def ceilings(session: Session) -> None:
    """Best products and copies of this device, from which the floors of later rows are computed."""
    shape, where = session.shape, device.taken()
    side, dtype = shape.square, torch.bfloat16
    flops = 2.0 * side**3

    def bf16() -> Callable[[int], object]:
        a, b = (torch.randn(side, side, device=where, dtype=dtype) for _ in range(2))
        return lambda _: a @ b

    def fp8() -> Callable[[int], object]:
        a, b = (torch.randn(side, side, device=where).clamp(-3, 3).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=where)
        return lambda _: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=dtype)

    def copy() -> Callable[[int], object]:
        source = torch.randn(shape.copied // 4, device=where)
        target = torch.empty_like(source)
        return lambda _: target.copy_(source)

    best = session.ceilings
    bf16_s = session.time(1, "product bf16", bf16, flops=flops)
    fp8_s = session.time(1, "product fp8", fp8, flops=flops, floor=flops / best.fp8)
    copy_s = session.time(1, "copy", copy, floor=2.0 * shape.copied / best.copy, note="reading and writing counted")
    session.ceilings = Ceilings(
        bf16=best.bf16 if bf16_s is None else flops / bf16_s,
        fp8=best.fp8 if fp8_s is None else flops / fp8_s,
        copy=best.copy if copy_s is None else 2.0 * shape.copied / copy_s,
    )


def _work(compute: Callable[[Tensor], Tensor], inputs: list[Tensor], weights: list[Tensor]) -> Callable[[int], object]:
    """Forward and backward, alternating between inputs."""
    gradient = torch.randn_like(inputs[0])

    def run(number: int) -> object:
        tokens = inputs[number % len(inputs)]
        return torch.autograd.grad(compute(tokens), [tokens, *weights], gradient)

    return run


def _tokens(session: Session) -> list[Tensor]:
    shape, where, dtype = session.shape, device.taken(), session.torch_dtype
    size = (shape.experts, shape.capacity, shape.hidden)
    return [torch.randn(size, device=where, dtype=dtype, requires_grad=True) for _ in range(2)]


def expert_networks(session: Session) -> None:
    """One layer's experts with equal numbers of tokens: a loop, bmm, grouped_mm, with and without fused SwiGLU."""
    shape = session.shape
    group = experts.ExpertShape(shape.experts, shape.capacity, shape.hidden, shape.inner)
    ways, flops = experts.ways(group, session.torch_dtype), shape.expert_flops()
    for key, name in _WAYS.items():
        if key not in ways:
            session.skip(2, f"experts {name}", f"torch {torch.__version__} has no {key} for these shapes")
            continue
        work = functools.partial(_way_work, session, group, ways[key])
        row, predicted = f"experts {name}, forward", f"experts {'loop' if key == experts.LOOP else 'bmm'}"
        session.time(2, row, functools.partial(work, backward=False), flops=flops, key=f"{predicted} forward")
        both = functools.partial(work, backward=True)
        session.time(2, f"{row} and backward", both, flops=3 * flops, key=f"{predicted} both")


def _way_work(
    session: Session, group: experts.ExpertShape, way: experts.Way, *, backward: bool
) -> Callable[[int], object]:
    tokens = _tokens(session)
    _, w1, w2 = experts.inputs(group, session.torch_dtype)
    if backward:
        return _work(lambda given: way(given, w1, w2), tokens, [w1, w2])

    @torch.no_grad()
    def run(number: int) -> object:
        return way(tokens[number % len(tokens)], w1, w2)

    return run


def expert_fp8(session: Session) -> None:
    """The same experts through Transformer-Engine: bf16, and every recipe, quantising weights each time or once."""
    flops = 3 * session.shape.expert_flops()
    names = ["experts te bf16", *(f"experts te {r} {w}" for r in RECIPES for w in ("first", "cached"))]
    if (missing := transformer_engine.problem()) is not None:
        for name in names:
            session.skip(3, name, f"Transformer-Engine: {missing}")
        return
    session.time(3, names[0], lambda: _te_work(session, "off", first=True), flops=flops)
    for recipe in RECIPES:
        for first in (True, False):
            name = f"experts te {recipe} {'first' if first else 'cached'}"
            session.time(
                3,
                name,
                functools.partial(_te_work, session, recipe, first=first),
                floor=flops / session.ceilings.fp8,
                flops=flops,
                note="weights quantised in every call" if first else "weights quantised before",
            )


@contextlib.contextmanager
def fp8_context(transformer: Any) -> Iterator[None]:
    """megatron-core's FP8 context of a configuration; nothing without FP8."""
    if not transformer.fp8:
        yield
        return
    from megatron.core.fp8_utils import get_fp8_context  # a null context without Transformer-Engine

    with get_fp8_context(transformer):
        yield


def te_experts(session: Session, recipe: str) -> tuple[nn.Module, Any]:
    """Transformer-Engine's experts of one layer and their configuration; initial weights drawn at random."""
    from mmscale.model.experts_te import TEExperts  # cannot be imported without Transformer-Engine

    shape = session.shape
    config = shape.config("moma", layers=1, dtype=session.dtype, backend="te", fp8=recipe, fusion="off")
    transformer = transformer_config(config)
    transformer_engine.forget_scales()
    made = TEExperts(
        transformer,
        count=shape.experts,
        width=shape.inner,
        groups=groups.collection(),
        own=range(shape.experts),
        compute=ExpertCompute(Products.TE, fused=True),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.02)
    return made, transformer


def _te_work(session: Session, recipe: str, *, first: bool) -> Callable[[int], object]:
    module, transformer = te_experts(session, recipe)
    called: list[bool] = []
    linears: list[Any] = [part for part in module.modules() if hasattr(part, "is_first_microbatch")]

    def compute(tokens: Tensor) -> Tensor:
        for linear in linears:
            linear.is_first_microbatch = first or not called
        called.append(True)
        with fp8_context(transformer):
            return module(tokens)

    return _work(compute, _tokens(session), list(module.parameters()))


def routing(session: Session) -> None:
    """Expert choice of one modality, gathering the chosen tokens, and the weighted sum; alternating between inputs."""
    shape, where = session.shape, device.taken()
    half, tokens = shape.experts // 2, shape.tokens
    dtype = session.torch_dtype
    capacity = shape.seq // 2 // half
    member = (torch.arange(shape.seq, device=where) % 2 == 0).unsqueeze(1).expand(-1, shape.micro_batch)

    def logits() -> list[Tensor]:
        return [torch.randn(shape.seq, shape.micro_batch, half, device=where) for _ in range(_ROTATED)]

    def choose(scores: Tensor) -> Any:
        return expert_choice(scores, member, Slots(capacity), per_sequence=True)

    def choice() -> Callable[[int], object]:
        scores = logits()
        return lambda number: choose(scores[number % _ROTATED])

    def gather() -> Callable[[int], object]:
        hidden = [torch.randn(tokens, shape.hidden, device=where, dtype=dtype) for _ in range(_ROTATED)]
        index = choose(logits()[0]).token.reshape(-1)
        return lambda number: hidden[number % _ROTATED].index_select(0, index)

    def back() -> Callable[[int], object]:
        selection = choose(logits()[0])
        size = (*selection.token.shape, shape.hidden)
        outputs = [torch.randn(size, device=where, dtype=dtype) for _ in range(_ROTATED)]
        return lambda number: combine(outputs[number % _ROTATED], selection, tokens)

    chosen = half * capacity * shape.micro_batch * shape.hidden
    width = dtype.itemsize
    copy = session.ceilings.copy
    session.time(5, "routing, choice", choice, floor=tokens * half * 4 / copy, key="routing", note="one modality")
    session.time(5, "routing, gather", gather, floor=2 * chosen * width / copy, key="-", note="one modality")
    floor = (chosen * width + 2 * tokens * shape.hidden * 4) / copy
    session.time(5, "routing, weighted sum", back, floor=floor, key="-", note="one modality, fp32 sums")
