"""Compares the training stability of emulated FP8 and bf16: learning rates, seeds and the sharpness of the loss.

After "To FP8 and Back Again" (arXiv 2405.18710), which asks whether a format narrows the range of learning rates and
seeds that train: the same toy runs in every format, over learning rates and seeds, and the loss around the final
weights is measured. Losses of a toy do not predict a large model's, but a fragile recipe shows early.

    mmscale bench fp8-stability --steps 200 --seeds 2 --lrs 4e-3,1.6e-2,6.4e-2
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmscale.bench.fp8_toy import Toy, toy_config, train_toy
from mmscale.errors import UsageError
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.step import Stepper, mean_losses

FORMATS: dict[str, dict[str, Any]] = {
    "high": {},  # `dtype` without FP8
    "delayed": {"fp8": "delayed", "fp8_emulate": True},
    "tensorwise": {"fp8": "tensorwise", "fp8_emulate": True},
    "blockwise": {"fp8": "blockwise", "fp8_emulate": True},
    "blockwise_e4m3": {"fp8": "blockwise", "fp8_emulate": True, "fp8_format": "e4m3"},
    "mxfp8": {"fp8": "mxfp8", "fp8_emulate": True},
    "nvfp4": {"fp8": "nvfp4", "fp8_emulate": True},
    "nvfp4_nearest": {"fp8": "nvfp4", "fp8_emulate": True, "fp4_stochastic_rounding": False},
}
BASE = "high"
_WORSE = 1.2  # a run has diverged if it ends with this multiple of the loss of its own best stretch
_STRETCH = 0.1  # length of a stretch, as a share of the steps


def run(
    *,
    formats: Sequence[str] | str = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"),
    lrs: Sequence[float] | float = (4e-3, 1.6e-2, 6.4e-2),
    seeds: int = 2,
    steps: int = 200,
    kind: str = "moma",
    hidden: int = 32,
    layers: int = 2,
    seq: int = 32,
    batch: int = 8,
    dtype: str = "bf16",
    epsilon: float = 0.05,
    radius: float = 0.05,
) -> dict[str, Any]:
    """Train a toy in every format with every learning rate and seed.

    Args:
        formats: names of FORMATS; `high` is always included.
        lrs: peak learning rates; sharpness is measured after runs with the middle one.
        seeds: seeds for each.
        steps: optimizer steps of a run.
        kind: dense or moma.
        hidden: width.
        layers: layers.
        seq: tokens of a sequence.
        batch: sequences of a step.
        dtype: bf16 or fp32.
        epsilon: how far logits may move, see `logit_sharpness`.
        radius: how far weights move, see `weight_sharpness`.

    Returns:
        `machine`, `settings`, and per format: `runs` (lr, seed, held-out loss, ratio to `high`, diverged), `diverged`,
        `worst_ratio`, `mean_ratio`, `lr_sensitivity`, `seed_spread`, `logit_sharpness`, `weight_sharpness`.
    """
    rates = sorted(float(lr) for lr in (lrs if isinstance(lrs, Sequence) else (lrs,)))
    names = (formats,) if isinstance(formats, str) else tuple(formats)
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise UsageError(
            f"bench fp8-stability: no format is called {unknown[0]}", remedy=f"there are {', '.join(FORMATS)}"
        )
    if hidden % 32 or seq % 16 or seeds < 1 or steps < 10:
        raise UsageError(
            f"bench fp8-stability: hidden = {hidden}, seq = {seq}, seeds = {seeds}, steps = {steps}",
            remedy="hidden is a multiple of 32, seq of 16; at least one seed and ten steps",
        )
    shape: dict[str, Any] = {
        "kind": kind,
        "hidden": hidden,
        "layers": layers,
        "seq": seq,
        "batch": batch,
        "steps": steps,
        "dtype": dtype,
    }
    device.keep_host_memory()
    own_groups = not torch.distributed.is_initialized()
    if own_groups:
        groups.initialize(RankEnv())
    try:
        found = {
            name: _format(name, rates, seeds, shape, epsilon=epsilon, radius=radius)
            for name in (BASE, *(name for name in FORMATS if name in names and name != BASE))
        }
    finally:
        if own_groups:
            groups.finalize()
    for format_ in found.values():
        _compare(format_, found[BASE])
    return {
        "machine": device.device_name(),
        "torch": torch.__version__,
        "settings": {**shape, "lrs": rates, "seeds": seeds, "epsilon": epsilon, "radius": radius},
        "formats": found,
    }


def _format(
    name: str, rates: list[float], seeds: int, shape: dict[str, Any], *, epsilon: float, radius: float
) -> dict[str, Any]:
    """All runs of one format."""
    runs, sharpness = [], []
    for lr in rates:
        for seed in range(1, seeds + 1):
            toy = train_toy(toy_config(**shape, lr=lr, seed=seed, precision=FORMATS[name]))
            loss, gone = toy.held_out_loss, has_diverged(toy)
            runs.append({"lr": lr, "seed": seed, "loss": loss, "first": toy.losses[0], "diverged": gone})
            sys.stderr.write(f"{name}, lr {lr:g}, seed {seed}: {loss:.4f}{', diverged' if gone else ''}\n")
            if lr == rates[len(rates) // 2] and not gone:
                sharpness.append(
                    (
                        logit_sharpness(toy.stepper, toy.held_out, epsilon=epsilon),
                        weight_sharpness(toy.stepper, toy.held_out, radius=radius),
                    )
                )
    means = [statistics.fmean(values) for values in zip(*sharpness, strict=True)] or [math.nan, math.nan]
    return {
        "runs": runs,
        "diverged": sum(entry["diverged"] for entry in runs),
        "lr_sensitivity": lr_sensitivity(runs),
        "seed_spread": _seed_spread(runs),
        "logit_sharpness": means[0],
        "weight_sharpness": means[1],
    }


def has_diverged(toy: Toy) -> bool:
    """Whether a run stopped early, or ended far above the best stretch of its own losses."""
    losses = toy.losses
    if not math.isfinite(losses[-1]) or not math.isfinite(toy.held_out_loss):
        return True
    length = max(1, int(_STRETCH * len(losses)))
    stretches = [statistics.fmean(losses[at : at + length]) for at in range(len(losses) - length + 1)]
    return stretches[-1] > _WORSE * min(stretches)


def lr_sensitivity(runs: Sequence[dict[str, Any]]) -> float:
    """Mean loss increase for learning rates other than the best one (arXiv 2309.14322, section 2).

    Mean over learning rates of min(loss, initial loss) - best loss; a diverged run counts with its initial loss.
    """
    by_rate: dict[float, list[float]] = {}
    for entry in runs:
        loss = entry["first"] if entry["diverged"] else min(entry["loss"], entry["first"])
        by_rate.setdefault(entry["lr"], []).append(loss)
    means = [statistics.fmean(losses) for losses in by_rate.values()]
    return statistics.fmean(means) - min(means)


def _seed_spread(runs: Sequence[dict[str, Any]]) -> float:
    """Largest difference between seeds of one learning rate, of runs that did not diverge."""
    by_rate: dict[float, list[float]] = {}
    for entry in runs:
        if not entry["diverged"]:
            by_rate.setdefault(entry["lr"], []).append(entry["loss"])
    return max((max(losses) - min(losses) for losses in by_rate.values()), default=math.nan)


def _compare(format_: dict[str, Any], base: dict[str, Any]) -> None:
    """Add the ratio of every loss to that of the same run in high precision."""
    for entry, other in zip(format_["runs"], base["runs"], strict=True):
        entry["ratio"] = entry["loss"] / other["loss"]
    ratios = [e["ratio"] for e, o in zip(format_["runs"], base["runs"], strict=True) if not o["diverged"]]
    format_["worst_ratio"] = max(ratios, default=math.nan)
    format_["mean_ratio"] = statistics.fmean(ratios) if ratios else math.nan


@torch.no_grad()
def logit_sharpness(stepper: Stepper, batches: Sequence[Batch], *, epsilon: float) -> float:
    """Largest relative increase of the loss within a box around the logits, in percent.

    100 (f(x + y) - f(x)) / (1 + f(x)) over |y_i| <= epsilon (|x_i| + 1): Keskar's sharpness (arXiv 1609.04836) of the
    logits, as in arXiv 2405.18710. Cross entropy decreases with the label's logit and increases with all others, so its
    maximum is in a known corner of the box, and no search is needed.
    """
    (chunk,) = stepper.chunks
    chunk.eval()
    before = after = count = 0.0
    for batch in batches:
        logits = chunk(
            input_ids=batch.tokens, position_ids=None, attention_mask=None, packed_seq_params=batch.params
        ).float()
        label = torch.nn.functional.one_hot(batch.labels.clamp(min=0), logits.shape[-1]).bool()
        step = epsilon * (logits.abs() + 1.0)
        mask = batch.loss_mask.float()
        before += float((mask * _cross_entropy(logits, label)).sum())
        after += float((mask * _cross_entropy(logits + torch.where(label, -step, step), label)).sum())
        count += float(mask.sum())
    return 100.0 * (after - before) / (count + before)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return logits.logsumexp(dim=-1) - logits.masked_fill(~label, 0.0).sum(dim=-1)


@torch.no_grad()
def weight_sharpness(stepper: Stepper, batches: Sequence[Batch], *, radius: float) -> float:
    """Relative increase of the loss after a step along the gradient of `radius` times the weights' norm, in percent.

    This is the first step of the search for the largest loss within a ball (SAM, arXiv 2010.01412). Weights are
    restored afterwards. Computed in the format of training, because its rounding is part of the question.
    """
    (chunk,) = stepper.chunks
    names = stepper.config.vocab.names
    before = mean_losses(stepper.evaluate(batches).double(), names)["loss"]
    with torch.enable_grad():
        stepper.accumulate(batches)
    moved = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    gradients = [parameter.main_grad.float() for parameter in moved]  # type: ignore[attr-defined]
    length = torch.stack([parameter.float().norm() for parameter in moved]).norm()
    slope = torch.stack([gradient.norm() for gradient in gradients]).norm()
    kept = [parameter.detach().clone() for parameter in moved]
    for parameter, gradient in zip(moved, gradients, strict=True):
        parameter.copy_(parameter.float() + radius * length / slope.clamp(min=1e-30) * gradient)
    after = mean_losses(stepper.evaluate(batches).double(), names)["loss"]
    for parameter, value in zip(moved, kept, strict=True):
        parameter.copy_(value)
    return 100.0 * (after - before) / (1.0 + before)


def render(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    settings = result["settings"]
    rates, base = settings["lrs"], settings["dtype"]
    lines = [
        f"{result['machine']}, torch {result['torch']}: {settings['kind']}, {settings['layers']} layers x "
        f"{settings['hidden']}, {settings['steps']} steps of {settings['batch']} x {settings['seq']} tokens, "
        f"{settings['seeds']} seed(s)",
        "",
        f"| format | {' | '.join(f'loss at lr {lr:g}' for lr in rates)} | worst / mean over {base} | diverged | "
        f"lr sensitivity | seed spread | sharpness of logits | of weights |",
        "|---" * (len(rates) + 7) + "|",
    ]
    for name, found in result["formats"].items():
        losses = [statistics.fmean(run["loss"] for run in found["runs"] if run["lr"] == lr) for lr in rates]
        cells = [
            base if name == BASE else name,
            *(f"{loss:.3f}" for loss in losses),
            f"{found['worst_ratio']:.3f} / {found['mean_ratio']:.3f}",
            f"{found['diverged']} of {len(found['runs'])}",
            f"{found['lr_sensitivity']:.3f}",
            f"{found['seed_spread']:.3f}",
            f"{found['logit_sharpness']:.2f} %",
            f"{found['weight_sharpness']:.2f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
