"""Compares models with a baseline at equal loss: FLOPs and seconds, per modality, for three kinds of loss.

It computes ratios from the data of run_losses.py and notes on their validity; it draws nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.data.prepared.identity import known
from mmscale.errors import CheckpointError, UsageError
from mmscale.report.equal_loss import Ratio, ratio_at
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import History
from mmscale.report.run_losses import (
    ALL,
    VIEWS,
    Measure,
    Model,
    View,
    group_models,
    read_run,
    refuse_data,
    refuse_vocabulary,
    views_of,
)
from mmscale.tables.settings import SCHEDULES
from mmscale.train.stages.stage_report import report_of

MEASURES: tuple[Measure, ...] = ("flops", "seconds")
SHARES = (0.25, 0.5, 0.75, 1.0)
_FLOPS_APART = 0.03


@dataclass(frozen=True)
class Speedup:
    """One ratio, and what it compares.

    Attributes:
        model: name of the model compared with the baseline.
        view, part, measure: which loss, of which modality, and FLOPs or seconds.
        loss: the level.
        share: the level is the baseline's loss after this share of its FLOPs; None: it is the model's own last loss.
        ratio: the baseline's FLOPs or seconds divided by the model's.
    """

    model: str
    view: View
    part: str
    measure: Measure
    loss: float
    share: float | None
    ratio: Ratio


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        baseline, models: the runs.
        parts: ALL and the modalities.
        speedups: every ratio that can be computed.
        notes: facts that limit the validity of the numbers.
    """

    baseline: Model
    models: tuple[Model, ...]
    parts: tuple[str, ...]
    speedups: tuple[Speedup, ...]
    notes: tuple[str, ...]

    @property
    def views(self) -> dict[View, str]:
        """The losses that are shown, each in words."""
        return views_of((self.baseline, *self.models))

    def find(self, model: str, view: View, part: str, measure: Measure, share: float | None) -> Speedup | None:
        """The ratio of a model in a view and part of the loss at a share of the baseline's work; None: not known."""
        wanted = (model, view, part, measure, share)
        return next(
            (one for one in self.speedups if (one.model, one.view, one.part, one.measure, one.share) == wanted), None
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale compare --json`."""
        return {
            "baseline": _entry(self.baseline),
            "models": [_entry(model) for model in self.models],
            "views": self.views,
            "speedups": [
                {
                    "model": one.model,
                    "view": one.view,
                    "modality": one.part,
                    "measure": one.measure,
                    "loss": one.loss,
                    "share_of_baseline": one.share,
                    "ratio": one.ratio.value,
                    "bound": str(one.ratio.bound),
                    "low": one.ratio.low,
                    "high": one.ratio.high,
                    "pairs": one.ratio.pairs,
                }
                for one in self.speedups
            ],
            "notes": list(self.notes),
        }


def compare(
    baseline: Path,
    others: Sequence[Path],
    *,
    shares: Sequence[float] = SHARES,
    losses: Sequence[float] = (),
    histories: Mapping[Path, History] | None = None,
    parts: Mapping[Path, HeldOutParts] | None = None,
) -> Comparison:
    """Compare runs with a baseline at equal loss.

    Runs with equal configurations (except names, seeds, layout and checkpoints) are seeds of one model: the ratio is
    computed from all their points together, and the smallest and largest ratio of single pairs are added.

    Args:
        baseline: run folder of the baseline, usually dense.
        others: run folders; further seeds of the baseline may be among them.
        shares: levels: the baseline's losses after these shares of its FLOPs. A model's own last loss is always one.
        losses: further levels of the loss over all modalities.
        histories: metrics that were already read, by resolved folder.
        parts: of held-out sets that runs read, where they are already known, by resolved folder.

    Raises:
        UsageError: a folder holds no run or nothing measured, or runs have other vocabularies or other data.
    """
    known, of_sets = histories or {}, parts or {}
    read = [
        read_run(folder, history=known.get(folder.resolve()), parts=of_sets.get(folder.resolve()))
        for folder in dict.fromkeys([baseline, *others])
    ]
    for run in read[1:]:
        refuse_vocabulary(read[0], run)
        refuse_data(read[0], run)
    first, *rest = group_models(read)
    if not rest:
        raise UsageError(
            f"compare: there is nothing to compare {baseline} with", remedy="name runs of other models behind it"
        )
    names = (ALL, *read[0].config.vocab.names)
    found = []
    for model, view, part, measure in itertools.product(rest, VIEWS, names, MEASURES):
        found += _speedups(first, model, view, part, measure, shares=shares, losses=losses if part == ALL else ())
    if not found:
        raise UsageError(
            f"compare: {baseline} and the others have no loss in common that was measured three times or more",
            remedy="compare runs that log or evaluate more often (log.every, train.eval_every)",
        )
    return Comparison(first, tuple(rest), names, tuple(found), tuple(_notes(first, rest)))


def _speedups(
    baseline: Model,
    model: Model,
    view: View,
    part: str,
    measure: Measure,
    *,
    shares: Sequence[float],
    losses: Sequence[float],
) -> list[Speedup]:
    mine, theirs = baseline.curves(view, part, measure), model.curves(view, part, measure)
    by_flops = baseline.curves(view, part, "flops")
    if not mine or not theirs:
        return []
    levels: list[tuple[float, float | None]] = [(by_flops[0].loss_at(s * by_flops[0].total), s) for s in shares]
    levels += [(loss, None) for loss in losses] + [(theirs[0].best, None)]
    found = [(loss, share, ratio_at(mine, theirs, loss)) for loss, share in levels]
    return [Speedup(model.name, view, part, measure, loss, share, ratio) for loss, share, ratio in found if ratio]


def _notes(baseline: Model, models: Sequence[Model]) -> list[str]:
    first, views = baseline.runs[0], views_of((baseline, *models))
    notes = []
    whole = any(one.held_out.partial for model in (baseline, *models) for one in model.runs if one.held_out)
    for model in (baseline, *models):
        run = model.runs[0]
        if dropped := sum(one.dropped for one in model.runs):
            notes.append(f"{model.name}: {dropped} losses that are not finite are left out")
        if abs(apart := run.flops_per_token / first.flops_per_token - 1) > _FLOPS_APART:
            notes.append(f"{model.name}: {apart:+.1%} FLOPs per token, which the ratios of FLOPs account for")
        notes += _of_part(model, whole=whole)
        notes += _of_stage(model)
        if missing := [meaning for view, meaning in views.items() if view not in run.losses]:
            notes.append(f"{model.name}: not measured: {'; '.join(missing)}")
        notes += _few_points_note(model)
        if run.config.model.auxiliary.mode == "joint":
            notes.append(
                f"{model.name}: auxiliary routers were trained along; their FLOPs are not counted, their time is"
            )
        if _held_out(run.config) != _held_out(first.config):
            notes.append(f"{model.name}: evaluated on another part of the held-out split than {baseline.name}")
        if (theirs := _weights(run.folder)) != (ours := _weights(first.folder)) and None not in (theirs, ours):
            notes.append(
                f"{model.name}: the weights of `mmscale data dedup` or `data select` are other ones than those of "
                f"{baseline.name}, so it was trained on other documents of the same data"
            )
        if differing := _other_objective(run.config, first.config):
            notes.append(f"{model.name}: another objective than {baseline.name}: {', '.join(differing)}")
        if _schedule(run.config) != _schedule(first.config):
            notes.append(f"{model.name}: another batch, learning rate, schedule or length than {baseline.name}")
    for name in _decaying(first.config):
        notes.append(
            f"learning rates decay ({name}): before its end a model has not had its decay, so ratios are too low"
        )
    if any(len(model.runs) == 1 for model in (baseline, *models)):
        notes.append("one seed of a model: its ratios have no spread")
    return notes


def _weights(run: Path) -> tuple[str, ...] | None:
    """Names of the weights that training applied to the documents of each data set; None: no checkpoint says so."""
    store = Store.of_run(run)
    try:
        data = known(store.info(store.choose()))
    except (CheckpointError, ValueError):
        return None
    return None if data is None else tuple(one.selection for one in data)


def _of_part(model: Model, *, whole: bool) -> list[str]:
    """A note about the part of the held-out set that losses were measured on, if any compared run read a part."""
    said = dict.fromkeys(run.held_out.noun for run in model.runs if run.held_out is not None and whole)
    return [f"{model.name}: held-out losses are of {' and '.join(said)}"] if said else []


def _of_stage(model: Model) -> list[str]:
    """A note about causal losses of the auxiliary stage: a single measurement gives no ratio at equal loss."""
    found = []
    for run in model.runs:
        report = report_of(run.folder)
        losses = {} if report is None else report.causal()
        shown = {where.routing: value for where, value in losses.items() if (where.figure, where.name) == ("loss", "")}
        found += [
            f"{model.name}: held-out loss {value:.4f} under {routing} routing after the auxiliary stage of step "
            f"{report.main_step} ({run.folder}): one measurement, so there is no ratio"
            for routing, value in shown.items()
            if report is not None
        ]
    return found


def _few_points_note(model: Model) -> list[str]:
    """A note about seeds with too few points for a curve, by the losses concerned."""
    views: dict[Path, list[View]] = {}
    for view in VIEWS:
        for run in model.with_few_points(view):
            views.setdefault(run.folder, []).append(view)
    return [
        f"{model.name}: {folder} has fewer than three points of {', '.join(f'{view} losses' for view in some)}: "
        "they are part of the ratio, not of its spread"
        for folder, some in views.items()
    ]


def _held_out(config: Config) -> int:
    return config.train.eval_batches * tokens_per_step(config)


def _other_objective(one: Config, other: Config) -> list[str]:
    """Settings of the objective that differ: two models that minimize different things."""
    mine, theirs = (_objective(config) for config in (one, other))
    return [key for key, value in mine.items() if value != theirs[key]]


def _objective(config: Config) -> dict[str, Any]:
    names = ("loss", "loss_args", "modality_weights", "loss_weights", "z_loss")
    found = {f"train.{name}": getattr(config.train, name) for name in names}
    return found | {f"objective.{name}": value for name, value in config.objective}


def _schedule(config: Config) -> tuple[object, ...]:
    return tokens_per_step(config), config.train.steps, config.optim


def _decaying(config: Config) -> list[str]:
    """Schedules of a run that decay, or that may: plug-ins."""
    spans = config.optim.spans(config.train.steps)
    names = dict.fromkeys(span.optim.schedule for span in spans)
    return [name for name in names if name not in SCHEDULES or not SCHEDULES[name].comparable]


def _entry(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "runs": [str(run.folder) for run in model.runs],
        "flops_per_token": model.runs[0].flops_per_token,
    }
