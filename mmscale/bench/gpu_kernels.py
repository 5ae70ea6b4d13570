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
from torch.nn import functional as F

from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import Ceilings
from mmscale.model.build import transformer_config
from mmscale.model.expert_compute import ExpertCompute, Products, feed_forward
from mmscale.model.routing import combine, expert_choice
from mmscale.runtime import device, groups, transformer_engine

RECIPES = ("delayed", "tensorwise", "blockwise")
_ROTATED = 4  # inputs that calls take in turns


def ceilings(session: Session) -> None:
    """Best products and copies of this device; floors of later rows follow from them."""
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
    """Forward and backward over inputs in turns."""
    gradient = torch.randn_like(inputs[0])

    def run(number: int) -> object:
        tokens = inputs[number % len(inputs)]
        return torch.autograd.grad(compute(tokens), [tokens, *weights], gradient)

    return run


def _tokens(session: Session) -> list[Tensor]:
    shape = session.shape
    size = (shape.experts, shape.capacity, shape.hidden)
    dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[session.dtype])
    return [torch.randn(size, device=device.taken(), dtype=dtype, requires_grad=True) for _ in range(2)]


def _loop(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Every expert by itself: what a list of networks would do."""
    return torch.stack(
        [
            feed_forward(tokens[e : e + 1], w1[e : e + 1], w2[e : e + 1], compute=ExpertCompute()).squeeze(0)
            for e in range(tokens.shape[0])
        ]
    )


def expert_networks(session: Session) -> None:
    """One layer's experts with equally many tokens each: a loop, bmm, grouped_mm, with and without fused SwiGLU."""
    shape, where = session.shape, device.taken()
    variants: dict[str, Callable[..., Tensor]] = {"loop": _loop}
    for name, compute in (
        ("bmm", ExpertCompute()),
        ("bmm, fused SwiGLU", ExpertCompute(fused=True)),
        ("grouped_mm, fused SwiGLU", ExpertCompute(Products.GROUPED_MM, fused=True)),
    ):
        variants[name] = lambda tokens, w1, w2, compute=compute: feed_forward(tokens, w1, w2, compute=compute)
    for name, function in variants.items():
        if "grouped_mm" in name and not hasattr(F, "grouped_mm"):
            session.skip(2, f"experts {name}", f"torch {torch.__version__} has no grouped_mm")
            continue

        def forward(function: Callable[..., Tensor] = function) -> Callable[[int], object]:
            inputs, (w1, w2) = _tokens(session), _weights(session, where)

            @torch.no_grad()
            def run(number: int) -> object:
                return function(inputs[number % len(inputs)], w1, w2)

            return run

        def both(function: Callable[..., Tensor] = function) -> Callable[[int], object]:
            w1, w2 = _weights(session, where)
            return _work(lambda tokens: function(tokens, w1, w2), _tokens(session), [w1, w2])

        flops, key = shape.expert_flops(), "loop" if name == "loop" else "bmm"
        session.time(2, f"experts {name}, forward", forward, flops=flops, key=f"experts {key} forward")
        session.time(2, f"experts {name}, forward and backward", both, flops=3 * flops, key=f"experts {key} both")


def _weights(session: Session, where: torch.device) -> tuple[Tensor, Tensor]:
    shape, dtype = session.shape, _tokens_dtype(session)
    w1 = torch.randn(shape.experts, shape.hidden, 2, shape.inner, device=where, dtype=dtype) * 0.02
    w2 = torch.randn(shape.experts, shape.inner, shape.hidden, device=where, dtype=dtype) * 0.02
    return w1.requires_grad_(), w2.requires_grad_()


def _tokens_dtype(session: Session) -> torch.dtype:
    return torch.bfloat16 if session.dtype == "bf16" else torch.float32


def expert_fp8(session: Session) -> None:
    """The same experts through Transformer-Engine: bf16, and every recipe, quantising weights anew or cached."""
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
    reset_fp8()
    made = TEExperts(
        transformer,
        count=shape.experts,
        width=shape.inner,
        groups=groups.collection(),
        compute=ExpertCompute(Products.TE, fused=True),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.02)
    return made, transformer


def reset_fp8() -> None:
    """Forget the amax buffers of modules that are gone: Transformer-Engine keeps them globally."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def _te_work(session: Session, recipe: str, *, first: bool) -> Callable[[int], object]:
    experts, transformer = te_experts(session, recipe)
    called: list[bool] = []
    linears: list[Any] = [module for module in experts.modules() if hasattr(module, "is_first_microbatch")]

    def compute(tokens: Tensor) -> Tensor:
        for linear in linears:
            linear.is_first_microbatch = first or not called
        called.append(True)
        with fp8_context(transformer):
            return experts(tokens)

    return _work(compute, _tokens(session), list(experts.parameters()))


def routing(session: Session) -> None:
    """Expert choice of one modality, gathering the chosen tokens, and the weighted sum back; inputs in turns."""
    shape, where = session.shape, device.taken()
    half, tokens = shape.experts // 2, shape.tokens
    dtype = _tokens_dtype(session)
    capacity = shape.seq // 2 // half
    member = (torch.arange(shape.seq, device=where) % 2 == 0).unsqueeze(1).expand(-1, shape.micro_batch)

    def logits() -> list[Tensor]:
        return [torch.randn(shape.seq, shape.micro_batch, half, device=where) for _ in range(_ROTATED)]

    def choose(scores: Tensor) -> Any:
        return expert_choice(scores, member, capacity, per_sequence=True)

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
    width = 2 if dtype is torch.bfloat16 else 4
    copy = session.ceilings.copy
    session.time(5, "routing, choice", choice, floor=tokens * half * 4 / copy, key="routing", note="one modality")
    session.time(5, "routing, gather", gather, floor=2 * chosen * width / copy, key="-", note="one modality")
    floor = (chosen * width + 2 * tokens * shape.hidden * 4) / copy
    session.time(5, "routing, weighted sum", back, floor=floor, key="-", note="one modality, fp32 sums")
