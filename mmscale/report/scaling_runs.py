"""Converts runs to points of the mixed-modal scaling law: training data, model size, final losses.

scaling.py fits the law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmscale.errors import UsageError
from mmscale.plan.parameters import count_parameters
from mmscale.report.run_losses import ComparedRun, View, read_run, refuse_vocabulary
from mmscale.report.scaling import FEWEST_RUNS, FEWEST_VALUES, Observations

Size = Literal["active", "total"]
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class ScalingPoint:
    """One run.

    Attributes:
        folder: of the run.
        parameters: of the model.
        tokens: of each modality that it was trained on.
        loss: mean of these modalities' losses at the last evaluation.
    """

    folder: Path
    parameters: float
    tokens: dict[str, float]
    loss: float


def read_points(
    folders: Sequence[Path], *, view: View = "causal", size: Size = "active", least_share: float = LEAST_SHARE
) -> list[ScalingPoint]:
    """Read runs.

    Args:
        folders: of the runs.
        view: which loss; only the causal one allows comparing dense and sparse models.
        size: definition of N: parameters used for an average token, or all.
        least_share: modalities with a smaller share of the tokens are ignored, because even data with images only has
            special tokens of text.

    Raises:
        UsageError: a folder is not a run, has no such loss, or has another vocabulary.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    for run in runs[1:]:
        refuse_vocabulary(runs[0], run)
    return [_point(run, view, size, least_share) for run in runs]


def observations(points: Sequence[ScalingPoint]) -> dict[tuple[str, ...], Observations]:
    """Points by the names of their modalities, ready to be fitted.

    Raises:
        UsageError: a run has three modalities, a modality of a pair has no runs alone, or there are too few runs.
    """
    groups: dict[tuple[str, ...], list[ScalingPoint]] = {}
    for point in points:
        groups.setdefault(tuple(point.tokens), []).append(point)
    found = {}
    for names, group in sorted(groups.items(), key=lambda item: len(item[0])):
        found[names] = Observations(
            np.array([point.parameters for point in group]),
            {name: np.array([point.tokens[name] for point in group]) for name in names},
            np.array([point.loss for point in group]),
        )
    for names, seen in found.items():
        _refuse(names, seen, found, groups[names][0].folder)
    return found


def _refuse(
    names: tuple[str, ...], seen: Observations, found: dict[tuple[str, ...], Observations], example: Path
) -> None:
    label = " + ".join(names)
    if len(names) > 2:
        raise UsageError(
            f"scaling: {example} was trained on {label}: the law knows one modality or two",
            remedy="leave such runs out, or raise --least-share if one of them is hardly there",
        )
    if missing := [name for name in names if (name,) not in found]:
        raise UsageError(
            f"scaling: there are runs on {label}, but none on {' and '.join(missing)} alone",
            remedy="add runs on each modality alone: what a pair gains or loses is measured against them",
        )
    if problem := seen.problem():
        raise UsageError(
            f"scaling: {label}: {problem} do not determine five constants",
            remedy=f"at least {FEWEST_RUNS} runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} numbers of tokens",
        )
    together = np.log(np.stack([seen.parameters, seen.all_tokens]))
    if abs(np.corrcoef(together)[0, 1]) > 1 - 1e-6:
        raise UsageError(
            f"scaling: {label}: the numbers of tokens are a function of the sizes, so their terms cannot be separated",
            remedy="add runs of the same size with more or fewer tokens",
        )


def _point(run: ComparedRun, view: View, size: Size, least_share: float) -> ScalingPoint:
    whole = sum(run.tokens.values())
    if not whole:
        raise UsageError(
            f"scaling: {run.folder} has logged no tokens of its modalities", remedy="name runs of this version"
        )
    names = [name for name, count in run.tokens.items() if count / whole >= least_share]
    measured = run.losses.get(view, {})
    if missing := [name for name in names if name not in measured]:
        raise UsageError(
            f"scaling: {run.folder} has no {view.replace('_', '-')} loss of {' and '.join(missing)}",
            remedy="evaluate while training (model.auxiliary.mode: joint for causal ones), or choose --view held_out",
        )
    # The last evaluation may lie before the last logged step.
    steps = {name: measured[name].flops[-1] / run.flops_per_step for name in names}
    tokens = {name: run.tokens[name] * steps[name] / run.steps for name in names}
    counted = count_parameters(run.config)
    parameters = counted.active if size == "active" else counted.total
    return ScalingPoint(
        run.folder, float(parameters), tokens, float(np.mean([measured[name].loss[-1] for name in names]))
    )
