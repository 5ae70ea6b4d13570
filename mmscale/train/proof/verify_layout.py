"""Compares a parallel layout with one process: losses, gradient norms, and every tensor of a checkpoint.

Users run it as `mmscale verify-layout`; the test matrix uses it too. Rank 0 first takes the steps alone, as a world of
one process, and saves after the first step. Then all ranks take the first step under the layout, save, and continue
from the checkpoint of the single process. The two checkpoints are compared tensor by tensor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.checkpoint.difference import TensorDifference, differences, largest
from mmscale.checkpoint.tensors import open_tensors
from mmscale.config import Config, ParallelConfig
from mmscale.config.rules import check
from mmscale.model.choices import Choices
from mmscale.runtime import groups as process_groups
from mmscale.runtime.groups import from_first
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.trial import SAVED_STEP, Trace, take_steps, with_share

__all__ = ["Trace", "compare", "take_steps", "verdict", "verify_layout", "with_share"]

_NAMED = 10  # largest number of differing tensors that a result lists


@dataclass(frozen=True)
class Tolerance:
    """Differences allowed for rounding of the same arithmetic in another order.

    Attributes:
        value: largest difference of losses, and largest relative difference of gradient norms.
        gradient: largest difference of a first moment after step 1, relative to the tensor's norm.
        state: the same for weights, second moments and thresholds.
        choices: share of the tokens chosen by experts and depth layers that may differ. The first step then repeats the
            choices of one process, so that tensors differ only by rounding. None: layouts make their own choices.
    """

    value: float
    gradient: float
    state: float
    choices: float | None


# Largest differences seen over all layouts in fp32 are 1e-6 for losses and norms and 2e-6 for single tensors (the
# weights of query norms, whose gradients are small sums of large terms): summation order only. In bf16 tensor
# parallelism rounds partial sums to 8 bits, so losses differ by some 1e-3 after a few steps. Single tensors differ by
# up to 2.1 % (query norms: 4.2 %) while choices are repeated, and by 9 to 16 % where an expert takes another token,
# which 2 of 1,000 choices do. FP8 rounds to 3 bits: another order of summation becomes a difference of 6 %. A sum that
# is missing, or one too many, is 70 % or more.
TOLERANCE = {
    "fp32": Tolerance(value=2e-6, gradient=5e-6, state=5e-6, choices=None),
    "bf16": Tolerance(value=5e-3, gradient=0.1, state=0.1, choices=0.02),
    "fp8": Tolerance(value=5e-3, gradient=0.5, state=0.9, choices=None),
}


def tolerance_of(config: Config) -> Tolerance:
    """The tolerance for a run's number formats."""
    return TOLERANCE[config.precision.dtype if config.precision.fp8 == "off" else "fp8"]


def single_process(config: Config) -> Config:
    """The same configuration without any parallelism and without recompute."""
    return config.model_copy(update={"parallel": ParallelConfig()})


def compare(reference: Trace, trace: Trace) -> tuple[float, float]:
    """Largest absolute difference of losses and largest relative difference of gradient norms."""
    loss = max(abs(a - b) for a, b in zip(reference.losses, trace.losses, strict=True))
    norm = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(reference.grad_norms, trace.grad_norms, strict=True))
    return loss, norm


def compare_tensors(
    reference: Path, saved: Path, *, tolerance: Tolerance = TOLERANCE["fp32"]
) -> list[TensorDifference]:
    """Differences between the checkpoints of two trials, the largest first."""
    return differences(open_tensors(reference, SAVED_STEP), open_tensors(saved, SAVED_STEP), within=tolerance.state)


def choices_of(config: Config, folder: Path, *, repeat: bool) -> Choices | None:
    """Records or repeats the choices of the first step in a folder; None if layouts make their own choices."""
    return None if tolerance_of(config).choices is None else Choices(folder / "choices", repeat=repeat)


def counted(choices: Choices | None) -> tuple[int, int]:
    """Numbers of chosen tokens that were compared and that differ, over all ranks; every rank calls it."""
    own = (0, 0) if choices is None else (choices.compared, choices.differing)
    compared, differing = (sum(counts) for counts in zip(*process_groups.gathered(own), strict=True))
    return compared, differing


def verdict(
    config: Config,
    *,
    reference: Trace,
    trace: Trace,
    tensors: Sequence[TensorDifference],
    choices: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The result of `mmscale verify-layout` for a layout.

    Args:
        config: gives the tolerance.
        reference: the trace of one process.
        trace: the layout's.
        tensors: differences between their checkpoints, the largest first.
        choices: the result of `counted`.

    Returns:
        `loss_difference`, `grad_norm_difference`, `tolerance`, `gradients` and `state` (number of tensors `compared`,
        `worst` tensor, its `difference`, `tolerance`, and names of those that `differ`), `choices` (number `compared`,
        share as `difference`, `tolerance`; null if layouts make their own choices), `passed`, and both traces.
    """
    allowed = tolerance_of(config)
    loss, norm = compare(reference, trace)
    parts = {
        "gradients": _part([one for one in tensors if one.is_gradient], allowed.gradient),
        "state": _part([one for one in tensors if not one.is_gradient], allowed.state),
    }
    # NaN fails every comparison.
    passed = loss <= allowed.value and norm <= allowed.value and not any(part["differ"] for part in parts.values())
    chosen: dict[str, Any] | None = None
    if allowed.choices is not None:
        compared, differing = choices
        chosen = {"compared": compared, "difference": differing / max(1, compared), "tolerance": allowed.choices}
        passed = passed and chosen["difference"] <= allowed.choices
    return {
        "loss_difference": loss,
        "grad_norm_difference": norm,
        "tolerance": allowed.value,
        **parts,
        "choices": chosen,
        "passed": passed,
        "reference": {"losses": reference.losses, "grad_norms": reference.grad_norms},
        "trace": {"losses": trace.losses, "grad_norms": trace.grad_norms},
    }


def _part(found: Sequence[TensorDifference], tolerance: float) -> dict[str, Any]:
    worst = largest(found)
    return {
        "compared": len(found),
        "worst": worst.name,
        "difference": worst.value,
        "tolerance": tolerance,
        "differ": [one.name for one in found if not one.value <= tolerance][:_NAMED],
    }


def verify_layout(config: Config, *, steps: int, env: RankEnv | None = None) -> dict[str, Any]:
    """Compare this run's layout with one process. Called on every rank, before any process group is started.

    Two checkpoints are written below `run.dir`, which all ranks must see, and removed again. Adam's moments are kept in
    fp32, whatever `optim.moments` says, because they are compared as gradients.

    Args:
        config: the run's configuration, with its parallel layout.
        steps: optimizer steps, at least 3: wrong gradients hardly change the loss at first.
        env: this process's place; read from the environment if not given.

    Returns:
        `layout`, `steps`, and the entries of `verdict`, on every rank.
    """
    from mmscale.runtime.rank_env import discover

    env = env or discover()
    check(config, world_size=env.world_size)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"moments": "fp32"})})
    folder: Path | None = None
    try:
        reference: Trace | None = None
        if env.rank == 0:
            folder = _folder(config)
            process_groups.initialize(RankEnv(local_rank=env.local_rank), seed=config.run.seed)
            choices = choices_of(config, folder, repeat=False)
            reference = take_steps(single_process(config), steps=steps, saved=folder / "one_process", choices=choices)
            if choices is not None:
                choices.save()
            process_groups.finalize()
        return _under_the_layout(config, env, steps=steps, reference=reference, folder=folder)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _under_the_layout(
    config: Config, env: RankEnv, *, steps: int, reference: Trace | None, folder: Path | None
) -> dict[str, Any]:
    """Take the steps on all ranks and compare the results; only rank 0 has those of the single process."""
    parallel = config.parallel
    process_groups.initialize(
        env, tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=config.run.seed
    )
    try:
        reference, folder = from_first((reference, folder))
        assert reference is not None and folder is not None
        alone, saved = folder / "one_process", folder / "layout"
        choices = choices_of(config, folder, repeat=True)
        trace = take_steps(config, steps=steps, saved=saved, reference=alone, choices=choices)
        tensors = from_first(compare_tensors(alone, saved, tolerance=tolerance_of(config)) if env.rank == 0 else None)
        chosen = counted(choices)
    finally:
        process_groups.finalize()
    layout = {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp,
        "ep": parallel.ep,
        "cp": parallel.cp,
        "world_size": env.world_size,
    }
    return {"layout": layout, "steps": steps} | verdict(
        config, reference=reference, trace=trace, tensors=tensors, choices=chosen
    )


def _folder(config: Config) -> Path:
    """A new folder that all ranks see."""
    parent = Path(config.run.dir)
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".verify-layout-", dir=parent)).absolute()
