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

from mmscale.bench.gpu_kernels import reset_fp8
from mmscale.bench.gpu_session import Session
from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import device, groups, stopwatch, transformer_engine
from mmscale.train.batch import Batch, to_device
from mmscale.train.optim import make_optimizer, wrap
from mmscale.train.step import Stepper
from mmscale.train.synthetic import SyntheticMixture
from mmscale.train.throughput import peak_tflops

_HALF = {"text": 0.5, "image": 0.5}


def token_choice(session: Session) -> None:
    """megatron-core's experts under top-1 token choice: as many products, but lengths that only the device knows."""
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
    dtype = torch.bfloat16 if session.dtype == "bf16" else torch.float32
    hidden = torch.randn(shape.tokens, shape.hidden, device=where, dtype=dtype)

    @torch.no_grad()
    def run(_: int) -> object:
        permuted, permuted_probs, order = permute(hidden, routing, probs=probs)
        counts = routing.sum(dim=0)  # megatron-core's TEGroupedMLP waits for it: a list of splits
        output, _ = experts(permuted, counts, permuted_probs)
        return unpermute(output, order, restore_shape=hidden.shape)

    return run


def depth_layer(session: Session) -> None:
    """A layer that processes a quarter of the tokens beside one that processes all, forward."""
    shape = session.shape
    config = shape.config("dense", layers=2, dtype=session.dtype, depth=True, fusion="off")
    batch = _batches(config, count=1)[0]

    def layer(index: int) -> Callable[[int], object]:
        model: Any = build_chunks(config, groups.collection())[0].eval()
        dtype = torch.bfloat16 if session.dtype == "bf16" else torch.float32
        model = model.to(dtype)
        hidden = torch.randn(shape.seq, shape.micro_batch, shape.hidden, device=device.taken(), dtype=dtype)
        rotary = model.rotary_pos_emb(shape.seq)

        @torch.no_grad()
        def run(_: int) -> object:
            return model.decoder.layers[index](hidden, packed_seq_params=batch.params, rotary_pos_emb=rotary)

        return run

    whole = session.time(6, "layer, all tokens", lambda: layer(1), flops=shape.layer_flops(), key="-")
    quarter = session.time(
        6, "layer, a quarter of the tokens", lambda: layer(0), flops=shape.layer_flops(0.25), key="depth layer"
    )
    if whole and quarter:
        session.facts["depth_layer_over_dense"] = quarter / whole


def _batches(config: Config, *, count: int) -> list[Batch]:
    mixture = SyntheticMixture(config, share=_HALF, padding=0.0)
    vocabulary = Vocabulary.from_config(config.vocab)
    return [to_device(mixture.micro_batch(index), vocabulary) for index in range(count)]


def stacks(session: Session) -> None:
    """Whole training steps of a dense stack and of one with experts: both backends, bf16 and FP8."""
    shape = session.shape
    te = transformer_engine.problem()
    seconds: dict[str, float] = {}
    for kind, layers in (("dense", shape.dense_layers), ("moma", shape.moma_layers)):
        for backend, fp8 in (("torch", "off"), ("te", "off"), ("te", "delayed"), ("te", "blockwise")):
            precision = session.dtype if fp8 == "off" else fp8
            key = f"stack {kind} {'bf16' if fp8 == 'off' else fp8}"
            row = f"stack {kind} {layers} layers, {backend}, {precision}"
            if backend == "te" and te is not None:
                session.skip(7, row, f"Transformer-Engine: {te}", key=key)
                continue
            config = shape.config(kind, layers=layers, dtype=session.dtype, backend=backend, fp8=fp8)
            found = _stack(session, row, key, config)
            if found is not None:
                seconds[f"{kind} {backend} {precision}"] = found / layers
    peak = peak_tflops(device.device_name(), session.dtype)
    session.facts["stacks"] = {
        "seconds_per_layer_and_step": seconds,
        "peak_tflops": peak,
        "mfu": {
            row.name: row.tflops / peak for row in session.rows if peak and row.number == 7 and row.tflops is not None
        },
    }


def _stack(session: Session, row: str, key: str, config: Config) -> float | None:
    shape, layers = session.shape, config.model.num_layers

    def prepare() -> Callable[[int], object]:
        collection = groups.collection()
        if config.precision.fp8 != "off":
            reset_fp8()
        transformer = transformer_config(config)
        chunks = wrap(config, transformer, build_chunks(config, collection, transformer=transformer), collection)
        optimizer = make_optimizer(config, chunks, collection)
        stepper = Stepper(config, chunks, optimizer, collection)
        batches = _batches(config, count=2)
        return lambda number: stepper.train([batches[number % 2]], lr=1e-4)

    best, flops = session.ceilings, shape.step_flops(layers)
    floor = flops / (best.bf16 if config.precision.fp8 == "off" else best.fp8)
    note = f"{shape.tokens:,} tokens a step, with the update"
    return session.time(7, row, prepare, flops=flops, floor=floor, key=key, note=note)


def warm_up() -> None:
    """Load the libraries and raise the clock before anything is timed."""
    where = device.taken()
    a = torch.randn(1024, 1024, device=where) if device.has_cuda() else torch.randn(64, 64)
    stopwatch.seconds(lambda _: a @ a, repeats=10)
