"""Losses of runs against FLOPs and time: read from run folders, checked for comparability, grouped by model.

`training`: the loss of the training batches, as in the paper; experts choose among all tokens, later ones included.
`held_out`: the same routing on held-out data. `causal`: held-out data, every token routed without using later ones;
only this one is valid for a model that generates. compare.py computes ratios.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.config.load import digest
from mmscale.data.prepared.manifest import read_manifest
from mmscale.errors import ConfigError, DataError, UsageError
from mmscale.plan.compute import flops_per_token
from mmscale.report.equal_loss import SMOOTH_BINS, Falling
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import History, read
from mmscale.runs.attempts import settings_file
from mmscale.runs.events import read_events
from mmscale.runs.extents import Extent
from mmscale.runs.held_out import EVAL
from mmscale.runs.metrics import METRICS
from mmscale.runs.routes import recorded_config
from mmscale.tables.routings import CAUSAL_ROUTINGS

View = Literal["training", "held_out", "causal"]
Measure = Literal["flops", "seconds"]
VIEWS: tuple[View, ...] = ("training", "held_out", "causal")
MEANING: dict[View, str] = {
    "training": "training loss, batch routing (leaks the future; what the paper reports)",
    "held_out": "held-out loss, batch routing (leaks the future)",
    "causal": "held-out loss, causal routing (every token routed from itself alone)",
}
# Of models in which nothing chooses tokens: `held_out` and `causal` are the same.
UNROUTED: dict[View, str] = {"training": "training loss", "causal": "held-out loss"}
ALL = "all"  # all modalities together
# Causal routings by which a run measures held-out losses, in order of preference.
_CAUSAL = tuple(routing for routing in CAUSAL_ROUTINGS if routing.mode.measured)
_LOSS = "loss"
# Settings that do not change what is computed. Two runs that differ only in these are seeds of one model.
_ASIDE = {"run", "checkpoint", "resilience", "log", "parallel"}


@dataclass(frozen=True)
class Points:
    """One loss of one run. All arrays have one entry per measurement.

    Attributes:
        flops: training FLOPs so far, padding included.
        seconds: of training so far, without pauses; NaN if they were not measured.
        loss: the measured values.
    """

    flops: NDArray[np.float64]
    seconds: NDArray[np.float64]
    loss: NDArray[np.float64]


_NOTHING = Points(np.zeros(0), np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class ComparedRun:
    """The data of a run for a comparison.

    Attributes:
        folder: of the run.
        config: of its latest attempt.
        losses: by view and modality (or ALL).
        dropped: number of losses that were not finite and are ignored.
        steps: last logged step.
        tokens: of each modality up to that step, without padding; empty if they were not logged.
        held_out: the part of the held-out split that its last held-out loss was measured on; None: unknown.
    """

    folder: Path
    config: Config
    losses: dict[View, dict[str, Points]]
    dropped: int
    steps: int
    tokens: dict[str, float]
    held_out: Extent | None = None

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token."""
        return flops_per_token(self.config).training

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of a step, padding included."""
        return tokens_per_step(self.config) * self.flops_per_token


@dataclass(frozen=True)
class Model:
    """Runs that differ only in their seeds.

    Attributes:
        name: of the first run.
        runs: one for each seed.
    """

    name: str
    runs: tuple[ComparedRun, ...]

    def curves(self, view: View, part: str, measure: Measure) -> list[Falling]:
        """The curve of all runs' points; with several runs, then those of runs with enough points for a separate one.

        Empty if too little was measured.
        """
        whole, alone = self._curves(view, part, measure)
        return [] if whole is None else [whole, *(curve for curve in alone.values() if curve is not None)]

    def with_few_points(self, view: View) -> list[ComparedRun]:
        """Runs with too few points for a separate curve."""
        found: dict[Path, ComparedRun] = {}
        for part in (ALL, *self.runs[0].config.vocab.names):
            whole, alone = self._curves(view, part, "flops")
            if whole is not None:
                found |= {run.folder: run for run in self.runs if run.folder in alone and alone[run.folder] is None}
        return list(found.values())

    def _curves(self, view: View, part: str, measure: Measure) -> tuple[Falling | None, dict[Path, Falling | None]]:
        """The curve of all points and, with several runs, the separate one of each; None: too few points."""
        points = {run.folder: run.losses.get(view, {}).get(part, _NOTHING) for run in self.runs}
        bins = SMOOTH_BINS if view == "training" else None
        whole = _falling(list(points.values()), measure, bins=bins)
        alone = {folder: _falling([own], measure, bins=bins) for folder, own in points.items()}
        return whole, alone if len(points) > 1 else {}


def views_of(models: Iterable[Model]) -> dict[View, str]:
    """The losses by which models are compared, each in words. If none routes, all held-out losses are causal."""
    return MEANING if any(run.config.model.routes for model in models for run in model.runs) else UNROUTED


def _falling(points: Sequence[Points], measure: Measure, *, bins: int | None) -> Falling | None:
    work, loss = (np.concatenate([getattr(one, name) for one in points]) for name in (measure, "loss"))
    try:
        return Falling(work, loss, bins=bins)
    except ValueError:  # too few points
        return None


def read_run(folder: Path, *, history: History | None = None, parts: HeldOutParts | None = None) -> ComparedRun:
    """Read the data of a run for a comparison.

    Args:
        folder: of the run.
        history: its metrics, if they were already read.
        parts: of held-out sets that it read, if they are already known.

    Raises:
        UsageError: there is no configuration, or no logged step.
    """
    remedy = "name a folder that `mmscale train` wrote"
    history = read(folder) if history is None else history
    try:
        configs = _configurations(folder, history)
    except ConfigError as error:
        raise UsageError(f"{folder} is no run of this version: {error.cause}", remedy=remedy) from error
    if not len(history):
        raise UsageError(f"{folder} has no {METRICS} with a logged step", remedy=remedy)
    config, work = configs[history.attempt], _work(history, configs)
    steps, seconds = _clock(history)
    losses: dict[View, dict[str, Points]] = {}
    dropped = 0
    for view, part in itertools.product(VIEWS, (ALL, *config.vocab.names)):
        at, values = history.measured(_key(view, part, config, history))
        known = np.isfinite(values)
        dropped += int((~known).sum())
        if known.any():
            flops = np.interp(at[known], history.steps, work)
            points = Points(flops, np.interp(at[known], steps, seconds), values[known])
            losses.setdefault(view, {})[part] = points
    counts = [(name, history.last(f"tokens/{name}")) for name in config.vocab.names]
    tokens = {name: count for name, count in counts if count is not None and np.isfinite(count)}
    parts = HeldOutParts.of_run(folder, read_events(folder)) if parts is None else parts
    extent = parts.of(history, f"{EVAL}{_LOSS}")
    return ComparedRun(folder, config, losses, dropped, int(history.steps[-1]), tokens, extent)


def _configurations(folder: Path, history: History) -> dict[int | None, Config]:
    """Configurations by attempt, of attempts that wrote rows; None: of rows without an attempt.

    Raises:
        ConfigError: one cannot be read.
    """
    attempts = np.unique(history.of("attempt")).tolist()
    numbers = [int(attempt) if np.isfinite(attempt) else None for attempt in attempts] or [None]
    files = {number: settings_file(folder, number) for number in numbers}
    loaded = {file: recorded_config(file) for file in set(files.values())}
    return {number: loaded[file] for number, file in files.items()}


def _work(history: History, configs: Mapping[int | None, Config]) -> NDArray[np.float64]:
    """Training FLOPs up to each row; the FLOPs of a step depend on the settings of its attempt."""
    attempts = history.of("attempt")
    per_step = np.zeros(len(history))
    for attempt, config in configs.items():
        rows = np.isnan(attempts) if attempt is None else attempts == attempt
        per_step[rows] = tokens_per_step(config) * flops_per_token(config).training
    if len(set(per_step.tolist())) == 1:
        return history.steps * per_step  # exact, where a sum would be rounded
    return np.cumsum(np.diff(history.steps, prepend=0.0) * per_step)


def _key(view: View, part: str, config: Config, history: History) -> str:
    """The name of a loss in metrics.jsonl. For a model without routing every loss is causal."""
    loss = _LOSS if part == ALL else f"{_LOSS}/{part}"
    if view == "training":
        return loss
    if view == "held_out" or not config.model.routes:
        return f"{EVAL}{loss}"
    names = [f"{EVAL}{routing}/{loss}" for routing in _CAUSAL]
    return next((name for name in names if name in history.columns), names[0])


def _clock(history: History) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps, and seconds of training up to them. A row's time is the mean since the previous row that has one."""
    steps, times = history.measured("step_time_s")
    steps, times = steps[np.isfinite(times)], times[np.isfinite(times)]
    if not len(steps):
        return np.array([0.0]), np.array([np.nan])
    return np.append(0.0, steps), np.append(0.0, np.cumsum(np.diff(steps, prepend=0.0) * times))


def refuse_vocabulary(first: ComparedRun, run: ComparedRun) -> None:
    """Refuse runs with different vocabularies, whose losses per token are not comparable.

    Raises:
        UsageError: the two runs have different ones.
    """
    if first.config.vocab != run.config.vocab:
        raise UsageError(
            f"{run.folder} has another vocabulary than {first.folder}: losses per token are not comparable",
            remedy="compare runs with equal vocab.modalities",
        )


def refuse_data(first: ComparedRun, run: ComparedRun) -> None:
    """Refuse runs with different data, whose losses are not comparable.

    Raises:
        UsageError: the two runs were trained on different data.
    """
    mine, theirs = first.config, run.config
    if mine.data.sources != theirs.data.sources and _data(mine) != _data(theirs):
        raise UsageError(
            f"{run.folder} was trained on other data ({_paths(theirs)}) than {first.folder} ({_paths(mine)})",
            remedy="compare runs with equal data.path or data.blend",
        )


def _data(config: Config) -> list[tuple[str, ...]]:
    """The identity of the data: digests of its preparation if the folders exist here, otherwise their paths."""
    found: list[tuple[str, ...]] = []
    for source in config.data.sources:
        try:
            manifest = read_manifest(Path(source.path))
        except DataError:
            found.append((str(Path(source.path).resolve()), str(source.weight)))
        else:
            found.append((manifest.source, *sorted(manifest.tokenizers.values()), str(source.weight)))
    return found


def _paths(config: Config) -> str:
    sources = config.data.sources
    return ", ".join(one.path if len(sources) == 1 else f"{one.path} of weight {one.weight}" for one in sources)


def group_models(runs: Sequence[ComparedRun]) -> list[Model]:
    """Runs grouped by model, so that runs of a group differ only in their seeds; the first run's group comes first."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        aside: dict[str, Any] = {name: Config.model_fields[name].default for name in _ASIDE}
        # Validation data does not affect training.
        aside["data"] = run.config.data.model_copy(update={"validation": {}})
        groups.setdefault(digest(run.config.model_copy(update=aside)), []).append(run)
    names = [group[0].folder.resolve().name for group in groups.values()]
    whole = len(set(names)) < len(names)
    return [
        Model(str(group[0].folder) if whole else group[0].folder.resolve().name, tuple(group))
        for group in groups.values()
    ]
