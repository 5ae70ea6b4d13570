"""Measurements 4, 6 and 7 of `mmscale bench gpu`: token choice, a depth layer, training steps of stacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_utils import permute, unpermute

from mmscale.bench import operators
from mmscale.bench.gpu_session import Session
from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import device, groups, stopwatch, transformer_engine
from mmscale.tables.settings import KINDS
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import Batch, to_device
from mmscale.train.steps.step import Stepper
from mmscale.train.throughput import peak_tflops

_HALF = {"text": 0.5, "image": 0.5}


def token_choice(session: Session) -> None:
    """megatron-core's experts under top-1 token choice: the same products, but lengths that only the device knows."""
    shape = session.shape
    for name, te in (("SequentialMLP", False), ("TEGroupedMLP", True)):
        for spread in ("balanced", "skewed"):
            row = f"token choice {name}, {spread}"
            if te and (missing := transformer_engine.problem()) is not None:
                session.skip(4, row, f"Transformer-Engine: {missing}", key="token choice")
                continue
            session.time(
                4,
                row,
                functools.partial(_token_choice, session, te=te, skewed=spread == "skewed"),
                flops=shape.expert_flops(),
                key="token choice",
                note="forward: permute, experts, unpermute" + ("; Zipf" if spread == "skewed" else ""),
            )


def _token_choice(session: Session, *, te: bool, skewed: bool) -> Callable[[int], object]:
    shape, where = session.shape, device.taken()
    config = shape.config("moma", layers=1, dtype=session.dtype, fusion="off")
    transformer = transformer_config(config)
    transformer.moe_ffn_hidden_size = shape.inner
    if te:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        parts = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        experts: Any = TEGroupedMLP(shape.experts, transformer, parts, pg_collection=groups.collection())
    else:
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = SequentialMLP(shape.experts, transformer, parts, pg_collection=groups.collection())
    experts = experts.to(where)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.02)
    weights = 1.0 / torch.arange(1, shape.experts + 1) if skewed else torch.ones(shape.experts)
    generator = torch.Generator().manual_seed(3)
    expert = (
        torch.multinomial(weights, shape.tokens, replacement=True, generator=generator)
        if skewed
        else torch.arange(shape.tokens) % shape.experts
    )
    routing = torch.nn.functional.one_hot(expert, shape.experts).bool().to(where)
    probs = routing.float() * 0.5
    hidden = torch.randn(shape.tokens, shape.hidden, device=where, dtype=session.torch_dtype)

    @torch.no_grad()
    def run(_: int) -> object:
        permuted, permuted_probs, order = permute(hidden, routing, probs=probs)
        counts = routing.sum(dim=0)  # megatron-core's TEGroupedMLP waits for this list of splits
        output, _ = experts(permuted, counts, permuted_probs)
        return unpermute(output, order, restore_shape=hidden.shape)

    return run


def depth_layer(session: Session) -> None:
    """A layer that processes a quarter of the tokens, compared with one that processes all, forward."""
    shape = session.shape
    config = shape.config("dense", layers=2, dtype=session.dtype, depth=True, fusion="off")
    batch = _batches(config, count=1)[0]

    def layer(index: int) -> Callable[[int], object]:
        model: Any = build_chunks(config, groups.collection())[0].eval()
        model = model.to(session.torch_dtype)
        size = (shape.seq, shape.micro_batch, shape.hidden)
        hidden = torch.randn(size, device=device.taken(), dtype=session.torch_dtype)
        rotary = model.rotary_pos_emb(shape.seq)

        @torch.no_grad()
        def run(_: int) -> object:
            return model.decoder.layers[index](hidden, packed_seq_params=batch.params, rotary_pos_emb=rotary)

        return run

    whole = session.time(6, "layer, all tokens", lambda: layer(1), flops=shape.layer_flops(), key="-")
    quarter = session.time(
        6, "layer, a quarter of the tokens", lambda: layer(0), flops=shape.layer_flops(depth=True), key="depth layer"
    )
    if whole and quarter:
        session.facts["depth_layer_over_dense"] = quarter / whole


def _batches(config: Config, *, count: int) -> list[Batch]:
    mixture = SyntheticMixture(config, share=_HALF, padding=0.0)
    vocabulary = Vocabulary.from_config(config.vocab)
    return [to_device(mixture.micro_batch(index), vocabulary) for index in range(count)]


VARIANTS = (("torch", "off"), ("te", "off"), ("te", "delayed"), ("te", "blockwise"))


def stacks(session: Session) -> None:
    """Training steps of dense stacks and of one with experts: both backends, bf16 and FP8.

    A dense stack that fills the memory, and one with as many layers as the one with experts. Forward and backward of
    the latter two have equal FLOPs, while the update processes the weights of all experts.
    """
    shape, te = session.shape, transformer_engine.problem()
    both: dict[str, float] = {}
    for kind, layers in shape.stacks:
        for backend, fp8 in VARIANTS:
            precision = session.dtype if fp8 == "off" else fp8
            stack = _Stack(session, shape.config(kind, layers=layers, dtype=session.dtype, backend=backend, fp8=fp8))
            name = f"stack {kind} {layers} layers, {backend}, {precision}"
            key = f"stack {kind} {layers} {'bf16' if fp8 == 'off' else fp8}"
            if backend == "te" and te is not None:
                session.skip(7, f"{name}, step", f"Transformer-Engine: {te}", key=key)
                continue
            flops = shape.step_flops(kind, layers)
            floor = flops / (session.ceilings.bf16 if fp8 == "off" else session.ceilings.fp8)
            passes = session.time(7, f"{name}, forward and backward", stack.passes, flops=flops, floor=floor, key="-")
            session.time(7, f"{name}, step", stack.steps, flops=flops, floor=floor, key=key, note="with the update")
            if passes is not None:
                both[f"{kind} {layers} {backend} {precision}"] = passes
                if KINDS[kind].experts and fp8 == "off":
                    session.facts.setdefault("profile", {})[name] = operators.profile(stack.once)  # type: ignore[index]
            del stack
            stopwatch.release()
    _summarize(session, both)


def _summarize(session: Session, both: dict[str, float]) -> None:
    peak, layers = peak_tflops(device.device_name(), session.dtype), session.shape.moma_layers
    found = [row for row in session.rows if row.number == 7 and row.tflops is not None]
    session.facts["stacks"] = {
        "peak_tflops": peak,
        "mfu": {row.name: row.tflops / peak for row in found if peak and row.tflops},
        "moma_over_dense": {
            name.removeprefix(f"moma {layers} "): seconds / both[name.replace("moma", "dense")]
            for name, seconds in both.items()
            if name.startswith("moma") and name.replace("moma", "dense") in both
        },
    }


class _Stack:
    """A model in training, created when it is first needed; if that fails, the error is its row's reason."""

    def __init__(self, session: Session, config: Config) -> None:
        self.session = session
        self.config = config
        self.stepper: Stepper | None = None
        self.batches: list[Batch] = []

    def _made(self) -> Stepper:
        if self.stepper is None:
            if self.config.precision.fp8 != "off":
                transformer_engine.forget_scales()
            self.stepper = build(self.config, groups.collection()).stepper
            self.batches = _batches(self.config, count=2)
        return self.stepper

    def passes(self) -> Callable[[int], object]:
        """Gradients of one micro-batch."""
        stepper = self._made()
        return lambda number: stepper.accumulate([self.batches[number % 2]])

    def steps(self) -> Callable[[int], object]:
        """A whole optimizer step of one micro-batch."""
        stepper = self._made()
        return lambda number: stepper.train([self.batches[number % 2]], lr=1e-4)

    def once(self) -> None:
        """One step."""
        self._made().train(self.batches[:1], lr=1e-4)


def warm_up() -> None:
    """Load the libraries and raise the clock before anything is timed."""
    where = device.taken()
    a = torch.randn(1024, 1024, device=where) if device.has_cuda() else torch.randn(64, 64)
    stopwatch.seconds(lambda _: a @ a, repeats=10)
