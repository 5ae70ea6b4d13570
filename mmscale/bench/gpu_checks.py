"""Correctness checks of the fast paths: measurement 8 of `mmscale bench gpu`, also used by tests/gpu.

Bytes of FP8 against the formulas of mmscale.model.fp8_formats on the host, experts against a loop in fp64, losses of
every backend and recipe that continues from one checkpoint, a checkpoint written and read, a run of a CPU continued
here.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.bench import experts
from mmscale.bench.gpu_kernels import RECIPES, fp8_context, te_experts
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import TINY, Shape
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.errors import TrainingError
from mmscale.model import fp8_formats
from mmscale.model.expert_compute import ExpertCompute, Products, feed_forward
from mmscale.model.state_te import scaled_modules
from mmscale.runtime import device, groups, stopwatch, transformer_engine
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import TrainingParts, build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState, unwrapped
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.step import mean_losses, reduce_sums

TOY = Shape(hidden=256, inner=512, heads=4, seq=256, micro_batch=8, experts=8, vocabulary=1024, moma_layers=4)
_BATCHES = 4  # number of batches, which repeat so that they can be learned
STEPS, HALF = 8, 4  # steps of the runs that are stopped and resumed
# Steps of the torch run, of the runs that continue from it, and of these the compared ones.
BEGUN, FOLLOWED, TAIL = 40, 12, 6
BYTES, EXPERTS_BF16, EXPERTS_FP8, LOSS, SAME, ACROSS = 0.0, 0.02, 0.12, 0.02, 1e-4, 2e-3


def run(session: Session, *, steps: int = 200) -> None:
    """All checks that this machine supports."""
    missing = transformer_engine.problem()
    stopwatch.full_precision()
    for name, products in (("bmm", Products.BMM), ("grouped_mm", Products.GROUPED_MM)):
        session.check(f"experts {name} against fp64", EXPERTS_BF16, functools.partial(experts_error, session, products))
    quantizers = [f"bytes of e4m3, {kind}" for kind in ("tensorwise", "rows of 128", "tiles of 128")]
    for name in quantizers:
        if missing is not None:
            session.leave_out(name, BYTES, f"Transformer-Engine: {missing}")
        else:
            session.check(name, BYTES, functools.partial(quantized_bytes, name))
    for recipe in ("off", *RECIPES):
        name, limit = f"experts te {recipe} against fp64", EXPERTS_BF16 if recipe == "off" else EXPERTS_FP8
        if missing is not None:
            session.leave_out(name, limit, f"Transformer-Engine: {missing}")
        else:
            session.check(name, limit, functools.partial(te_experts_error, session, recipe))
    _losses(session, steps=steps, missing=missing)
    for backend, recipe in (("torch", "off"), ("te", "off"), ("te", "delayed")):
        name = f"stopped and resumed, {backend}, fp8 {recipe}"
        if backend == "te" and missing is not None:
            session.leave_out(name, SAME, f"Transformer-Engine: {missing}")
        else:
            session.check(name, SAME, functools.partial(resumed, toy(session, backend, recipe)))
    session.check("a run of a CPU continued here", ACROSS, from_cpu)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())


def _reference(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """A loop over experts in fp64 on the host."""
    tokens, w1, w2 = (tensor.detach().double().cpu() for tensor in (tokens, w1, w2))
    out = []
    for expert in range(tokens.shape[0]):
        gate, up = tokens[expert] @ w1[expert, :, 0], tokens[expert] @ w1[expert, :, 1]
        out.append((gate * torch.sigmoid(gate) * up) @ w2[expert])
    return torch.stack(out)


def _inputs(session: Session) -> tuple[Tensor, Tensor, Tensor]:
    """Experts small enough for fp64 on the host."""
    shape = session.shape
    group = experts.ExpertShape(experts=4, rows=64, hidden=min(shape.hidden, 256), ffn=min(shape.inner, 512))
    return experts.inputs(group, session.torch_dtype, seed=11)


def experts_error(session: Session, products: Products) -> tuple[float, str]:
    """Relative error of the experts' output."""
    tokens, w1, w2 = _inputs(session)
    found = feed_forward(tokens, w1, w2, compute=ExpertCompute(products, fused=True))
    return _relative(found, _reference(tokens, w1, w2)), "relative error of the output"


def te_experts_error(session: Session, recipe: str) -> tuple[float, str]:
    """The same for Transformer-Engine's experts with the same weights, in the second call, when scales are known."""
    from mmscale.model.state_te import weight_of_w1, weight_of_w2

    tokens, w1, w2 = _inputs(session)
    count, _, hidden = tokens.shape
    small = replace(session, shape=replace(session.shape, hidden=hidden, inner=w2.shape[1], experts=count))
    module: Any
    module, transformer = te_experts(small, recipe)
    with torch.no_grad():
        for index in range(count):
            getattr(module.linear_fc1, f"weight{index}").copy_(weight_of_w1(w1[index : index + 1]))
            getattr(module.linear_fc2, f"weight{index}").copy_(weight_of_w2(w2[index : index + 1]))
    for _ in range(2):
        with fp8_context(transformer):
            found = module(tokens)
    return _relative(found, _reference(tokens, w1, w2)), "relative error of the output"


def quantized_bytes(name: str) -> tuple[float, str]:
    """Share of FP8 codes and scales that differ from the formulas on the host."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    generator = torch.Generator().manual_seed(7)
    values = torch.randn(256, 384, generator=generator) * torch.logspace(-6, 4, 256).unsqueeze(1)
    values[0, :] = 0.0
    values = values.bfloat16()
    here, e4m3 = values.to(device.taken()), tex.DType.kFloat8E4M3
    found: Any
    if name.endswith("tensorwise"):
        found = Float8CurrentScalingQuantizer(e4m3, device.taken(), rowwise=True, columnwise=False)(here)
        codes, inverse = found._data, found._scale_inv.reshape(-1)
        scale = fp8_formats.scale_of(fp8_formats.amax_of(values), fp8_formats.E4M3)
        expected = fp8_formats.quantize_tensor(values, scale, fp8_formats.E4M3)
        expected_inverse = expected.scale_inv.reshape(-1)
    else:
        blocks = fp8_formats.Blocks.ROW if "rows" in name else fp8_formats.Blocks.TILE
        dimensions = 1 if blocks is fp8_formats.Blocks.ROW else 2
        quantizer = Float8BlockQuantizer(e4m3, rowwise=True, columnwise=False, block_scaling_dim=dimensions)
        found = quantizer(here)
        codes, inverse = found._rowwise_data, found._rowwise_scale_inv
        expected = fp8_formats.quantize_blocks(values, fp8_formats.E4M3, blocks)
        expected_inverse = expected.scale_inv
        if dimensions == 1:  # the device stores [block columns, rows], padded
            inverse = inverse.t()
        inverse = inverse[: expected_inverse.shape[0], : expected_inverse.shape[1]]
    codes_wrong = (codes.cpu().view(torch.uint8) != expected.codes.view(torch.uint8)).double().mean()
    scales_wrong = (inverse.cpu().float() != expected_inverse.float()).double().mean()
    return float(codes_wrong + scales_wrong), f"share of codes {codes_wrong:.2e}, of scales {scales_wrong:.2e}"


def toy(session: Session, backend: str, recipe: str) -> Config:
    """A model with experts that learns in seconds."""
    shape = TINY if session.shape == TINY else TOY
    return shape.config("moma", layers=shape.moma_layers, dtype=session.dtype, backend=backend, fp8=recipe)


def parts_of(config: Config) -> tuple[TrainingParts, TrainState]:
    """Model and optimizer with their initial weights."""
    if config.precision.fp8 != "off":
        transformer_engine.forget_scales()
    parts = build(config, groups.collection())
    return parts, TrainState(parts.chunks, parts.optimizer)


def train(config: Config, parts: TrainingParts, state: TrainState, *, until: int, lr: float = 2e-3) -> list[float]:
    """Losses of the steps up to this one; the same batches repeat."""
    mixture = SyntheticMixture(config, share={"text": 0.5, "image": 0.5}, padding=0.0)
    vocabulary, losses = Vocabulary.from_config(config.vocab), []
    while state.step < until:
        batch = to_device(mixture.micro_batch(state.step % _BATCHES), vocabulary)
        result = parts.stepper.train([batch], lr=lr)
        losses.append(mean_losses(reduce_sums(result.sums, parts.groups), config.vocab.names)["loss"])
        state.step += 1
    return losses


@dataclass(frozen=True)
class Begun:
    """A run of the torch backend without FP8, from which every backend and recipe continues.

    Attributes:
        folder: of its checkpoint.
        step: of the checkpoint.
        losses: of its own steps after the checkpoint.
    """

    folder: Path
    step: int
    losses: tuple[float, ...]


def begin(session: Session, folder: Path, *, steps: int = BEGUN) -> Begun:
    """Train, save, and continue."""
    config = toy(session, "torch", "off")
    parts, state = parts_of(config)
    train(config, parts, state, until=steps)
    with parts.stepper.materialized():
        _manager(folder).save(state, last=True)
    return Begun(folder, steps, tuple(train(config, parts, state, until=steps + FOLLOWED)))


def follows(session: Session, begun: Begun, backend: str, recipe: str) -> tuple[float, str]:
    """Largest difference of a backend's and recipe's losses from torch's within a few steps from the same state.

    Not from the start: while the model memorises the batches the loss decreases by 1 to 2 % a step, and rounding
    determines when that begins (docs/fp8.md has runs of one recipe that differ by 6 % after 60 steps).
    """
    config = toy(session, backend, recipe)
    parts, state = parts_of(config)
    _manager(begun.folder).load(state, begun.step)
    found = train(config, parts, state, until=begun.step + FOLLOWED)
    mine, base = (sum(losses[-TAIL:]) / TAIL for losses in (found, begun.losses))
    return abs(mine / base - 1), f"loss {found[0]:.3f} to {mine:.4f}, torch without FP8 {base:.4f}"


def _losses(session: Session, *, steps: int, missing: str | None) -> None:
    """Transformer-Engine under every recipe: that it learns, and that it follows torch without FP8."""
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        _followed(session, Path(folder), steps=steps, missing=missing)


def _followed(session: Session, folder: Path, *, steps: int, missing: str | None) -> None:
    begun: list[Begun] = []

    def compare(recipe: str) -> tuple[float, str]:
        config = toy(session, "te", recipe)
        parts, state = parts_of(config)
        curve = train(config, parts, state, until=steps)
        shown = [round(loss, 5) for loss in curve[:: max(1, steps // 20)]]
        session.facts[f"loss of {steps} steps, te {recipe}"] = shown
        if not curve[-1] < curve[0]:
            raise TrainingError(f"the loss did not fall: {curve[0]:.3f} to {curve[-1]:.3f}")
        if not begun:
            begun.append(begin(session, folder, steps=min(BEGUN, steps)))
        apart, note = follows(session, begun[0], "te", recipe)
        return apart, f"{note}; alone {curve[0]:.3f} to {curve[-1]:.4f} in {steps} steps"

    for recipe in ("off", *RECIPES):
        name = f"losses after a checkpoint of torch, te, fp8 {recipe}"
        if missing is not None:
            session.leave_out(name, LOSS, f"Transformer-Engine: {missing}")
        else:
            session.check(name, LOSS, functools.partial(compare, recipe))


def _ignore_event(*_: object, **__: object) -> None:
    pass


def _manager(folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, every=0, keep=9, attempt=1, info={}, on_event=_ignore_event)


def _held(state: TrainState) -> list[Tensor]:
    """Copies of weights, FP8 scales, master weights and moments on this rank."""
    found = list(unwrapped(state.chunks[0]).parameters())
    found += [module.fp8_state() for _, module in scaled_modules(unwrapped(state.chunks[0]))]
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found.append(parameter)
                found += [value for value in part.optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return [tensor.detach().float().cpu().clone() for tensor in found]


def resumed(config: Config) -> tuple[float, str]:
    """Differences of all tensors after a save and a load into a new model, and of the next loss.

    Later losses are not compared: kernels that add in no fixed order make equal runs diverge on a GPU.
    """
    parts, state = parts_of(config)
    train(config, parts, state, until=HALF)
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        with parts.stepper.materialized():
            _manager(Path(folder)).save(state, last=True)
        before = _held(state)
        whole = train(config, parts, state, until=HALF + 1)
        del parts, state
        stopwatch.release()
        parts, state = parts_of(config)
        _manager(Path(folder)).load(state, HALF)
        after = _held(state)
        again = train(config, parts, state, until=HALF + 1)
    changed = sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    note = f"{changed} of {len(before)} tensors changed; relative difference of the next loss"
    return changed + _differences(whole, again), note


def _differences(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


def from_cpu() -> tuple[float, str]:
    """A run of four steps in fp32 on a CPU, in a process that sees no device, continued on both."""
    config = TINY.config("moma", layers=2, dtype="fp32", backend="torch")
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = (sys.executable, "-m", "mmscale.bench.gpu_checks", folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise TrainingError(f"the run on a CPU failed: {(done.stderr.splitlines() or ['no message'])[-1][:200]}")
        there = [float(word) for word in done.stdout.split()[-(STEPS - HALF) :]]
        parts, state = parts_of(config)
        _manager(Path(folder)).load(state, HALF)
        here = train(config, parts, state, until=STEPS)
    return _differences(there, here), "largest relative difference of the losses, fp32"


def _on_cpu(folder: Path) -> None:
    """The part of `from_cpu` that runs in the other process: save half-way, continue, print the losses."""
    config = TINY.config("moma", layers=2, dtype="fp32", backend="torch")
    groups.initialize(RankEnv(), seed=config.run.seed)
    parts, state = parts_of(config)
    train(config, parts, state, until=HALF)
    with parts.stepper.materialized():
        _manager(folder).save(state, last=True)
    sys.stdout.write(" ".join(map(repr, train(config, parts, state, until=STEPS))) + "\n")
    groups.finalize()


if __name__ == "__main__":
    _on_cpu(Path(sys.argv[1]))
