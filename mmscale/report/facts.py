"""Text and tables of a report: results, configuration, environment, differences between runs, and warnings.

Reads the small files of a run folder.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.config.document import read_file
from mmscale.errors import ConfigError
from mmscale.report.accuracy_charts import guessing_of
from mmscale.report.charts import modalities_of
from mmscale.report.evaluated_data import evaluated_data_notes
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import History
from mmscale.report.timeline import Event, Timeline
from mmscale.runs.attempts import attempts_with_settings, settings_file
from mmscale.runs.display_names import EVENTS as EVENT_WORDS
from mmscale.runs.display_names import in_words
from mmscale.runs.events import ROUTINE
from mmscale.runs.held_out import ACCURACY, EVAL, HeldOut
from mmscale.runs.last_step import last_step
from mmscale.runs.metrics import METRICS
from mmscale.runs.unrouted import note as unrouted_note
from mmscale.runs.unrouted import unrouted
from mmscale.train.stages.origin import folder_of
from mmscale.train.stages.stage_report import report_of
from mmscale.wording import numbered

_DIFF_UP_TO = 20_000  # longest diff of uncommitted changes on a page [characters]


def results(
    history: History,
    *,
    timeline: Timeline | None = None,
    events: Sequence[Event] = (),
    since: Callable[[str], int] = lambda _: 0,
    parts: HeldOutParts | None = None,
    whole: bool = False,
    routed: bool | None = None,
) -> dict[str, str]:
    """Results of a run, as text by row name; values that were not measured are omitted.

    Args:
        history: its metrics.
        timeline: of the run.
        events: of events.jsonl.
        since: returns the step after which the held-out losses of a column are comparable with each other.
        parts: of held-out sets that the run read; None: unknown.
        whole: also name sets that were read completely, because another run read a part.
        routed: whether rows name the routing mode; None: if the run's model routes.
    """
    facts: dict[str, str] = {}
    parts = parts or HeldOutParts()
    routed = history.routes if routed is None else routed
    if len(history):
        facts["last step"] = _last_step(history, events)
    chances = {f"{ACCURACY}{name}": spans[-1].value for name, spans in guessing_of(events).items()}
    for key in history.columns:
        value = history.last(key) if key.split("/")[0] in ("loss", EVAL[:-1]) and "z_loss" not in key else None
        if value is not None:
            measured, shown = HeldOut.of(key), f"{value:.4f}"
            if measured and not measured.name and (chance := chances.get(measured.figure)) is not None:
                shown = f"{value:.1%}, guessing {chance:.1%}"
            facts[_name(key, routed=routed)] = (
                f"{shown}{_at_step(history, key)}{parts.words(history, key, whole=whole)}"
            )
    facts |= _best(history, since=since, parts=parts, whole=whole, routed=routed)
    for key, name, form in (
        ("tokens", "tokens", "{:,.0f}"),
        ("flops", "model FLOPs", "{:.3e}"),
    ):
        value = history.last(key)
        if value is not None:
            facts[name] = form.format(value) if value < 1e9 or key == "flops" else f"{value / 1e9:,.2f}B"
    for key, name, form in (
        ("tokens_per_second", "tokens per second, median", "{:,.0f}"),
        ("model_tflops_per_rank", "model TFLOP/s per rank, median", "{:.3g}"),
        ("mfu", "MFU, median", "{:.1%}"),
    ):
        values = history.measured(key)[1]
        if np.isfinite(values).any():
            facts[name] = form.format(float(np.nanmedian(values)))
    for name, (share, step) in _unrouted(history).items():
        facts[f"tokens of {name} that no expert took"] = f"{share:.1%}{_older(history, step)}"
    if timeline is not None and timeline.goodput is not None:
        facts["goodput"] = f"{timeline.goodput:.1%}"
    numbers = [int(event.get("attempt", 1)) for event in events if isinstance(event.get("attempt"), int)]
    attempts = history.measured("attempt")[1]
    facts["attempts"] = str(max([*numbers, int(attempts.max()) if len(attempts) else 1]))
    unusual = Counter(str(event.get("event")) for event in events if event.get("event") not in ROUTINE)
    return facts | {EVENT_WORDS.get(name, in_words(name)): f"{number:,}" for name, number in sorted(unusual.items())}


def _best(
    history: History, *, since: Callable[[str], int], parts: HeldOutParts, whole: bool, routed: bool
) -> dict[str, str]:
    """The lowest held-out losses over all modalities, and the steps of their measurement."""
    found = {}
    for key in history.columns:
        measured = HeldOut.of(key)
        if measured is None or measured.figure != "loss" or measured.stage:
            continue
        steps, values = history.measured(key)
        steps, values = steps[steps > since(key)], values[steps > since(key)]
        if len(values) > 1 and np.isfinite(values).any():
            place = int(np.nanargmin(values))
            row = int(np.searchsorted(history.steps, steps[place]))
            part = parts.words(history, key, row=row, whole=whole)
            found[f"best loss, {measured.where(routed=routed)}"] = (
                f"{values[place]:.4f} at step {int(steps[place]):,}{part}"
            )
    return found


def _unrouted(history: History) -> dict[str, tuple[float, int]]:
    """The latest share of each group's tokens that no expert took, and its step: a batch may lack a group's tokens."""
    latest = {key: history.last(key) for key in history.columns}
    known = {key: value for key, value in latest.items() if value is not None and np.isfinite(value)}
    steps = unrouted({key: float(history.measured(key)[0][-1]) for key in known})
    return {name: (share, int(steps[name])) for name, share in unrouted(known).items()}


def _unrouted_notes(history: History) -> list[str]:
    """A sentence about high shares for each step to which the latest ones belong."""
    found: dict[int, dict[str, float]] = {}
    for name, (share, step) in _unrouted(history).items():
        found.setdefault(step, {})[name] = share
    said = {step: unrouted_note(shares) for step, shares in sorted(found.items(), reverse=True)}
    last = int(history.steps[-1]) if len(history) else 0
    return [
        f"at {'the last logged step' if step == last else f'step {step:,}'}, {high}"
        for step, high in said.items()
        if high
    ]


def losses(history: History, *, parts: HeldOutParts | None = None) -> dict[str, dict[str, str]]:
    """The latest losses: by kind of measurement (training, held out under each routing), then by modality.

    Args:
        history: metrics of the run.
        parts: of held-out sets that it read; None: unknown.
    """
    parts = parts or HeldOutParts()
    found: dict[str, dict[str, str]] = {}
    for key in history.columns:
        measured = HeldOut.of(key)
        name = key if measured is None else measured.figure
        value = history.last(key) if name.split("/")[0] == "loss" else None
        if value is not None:
            kind = "training" if measured is None else _kind(history, key, measured, parts)
            row = name.removeprefix("loss").strip("/")
            # A modality that the last batches lack has a training loss of an earlier step.
            older = _at_step(history, key) if measured is None else ""
            found.setdefault(kind, {})[f"loss per {row} token" if row else "loss per token"] = f"{value:.4f}{older}"
    return found


def _kind(history: History, key: str, measured: HeldOut, parts: HeldOutParts) -> str:
    """The data and the routing of a held-out value, its step if that is an older one, and the part of the set."""
    step = int(history.measured(key)[0][-1])
    older = "" if step == int(history.steps[-1]) else f", step {step:,}"
    return f"{measured.where(routed=history.routes)}{older}{parts.words(history, key)}"


def _last_step(history: History, events: Sequence[Event]) -> str:
    """The last logged step, or the later one that the last attempt had saved when it ended in order."""
    logged = int(history.steps[-1])
    done = max(logged, step_reached(history, events))
    return f"{done:,}" if done == logged else f"{done:,}, the last logged one is {logged:,}"


def step_reached(history: History, events: Sequence[Event]) -> int:
    """The last step of the newest attempt."""
    logged = int(history.steps[-1]) if len(history) else 0
    return last_step(events, logged=logged, attempt=history.attempt or 0)


def _at_step(history: History, key: str) -> str:
    """`, at step 360` if the latest value of a figure is older than the last step; else empty."""
    return _older(history, int(history.measured(key)[0][-1]))


def _older(history: History, step: int) -> str:
    """`, at step 360` if that is not the last step; else empty."""
    return "" if step == int(history.steps[-1]) else f", at step {step:,}"


def _name(key: str, *, routed: bool) -> str:
    measured = HeldOut.of(key)
    if measured is None:
        return f"{HeldOut(key).measure}, training"
    return f"{measured.measure}, {measured.where(routed=routed)}"


def settings(run: Path, *, attempt: int | None = None) -> dict[str, Any]:
    """The configuration of an attempt by dotted key, as it was written; empty if it cannot be read.

    Args:
        run: the run's folder.
        attempt: the attempt; None: the latest one.
    """
    try:
        data = read_file(settings_file(run, attempt)).data
    except ConfigError:
        return {}
    return dict(_flat(data)) if data else {}


def changes(run: Path) -> list[tuple[int, str, Any, Any]]:
    """Changes of an attempt's configuration from the previous one: attempt, key, before, after."""
    found = []
    for before, after in itertools.pairwise(attempts_with_settings(run)):
        old, new = settings(run, attempt=before), settings(run, attempt=after)
        if old and new:
            found += [(after, key, old.get(key), new.get(key)) for key in _differing((old, new))]
    return found


def differences(some: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Keys that are not the same in all, with the value of each."""
    return [(key, [one.get(key) for one in some]) for key in _differing(some)]


def environment(run: Path) -> dict[str, Any]:
    """environment.json by dotted key, lists unchanged; empty if it cannot be read."""
    try:
        content = bounded.read_object(run / "environment.json")
    except (OSError, ValueError):
        return {}
    flat = dict(_flat(content))
    diff = flat.get("git.diff")
    if isinstance(diff, str) and len(diff) > _DIFF_UP_TO:
        flat["git.diff"] = f"{diff[:_DIFF_UP_TO]}\n... {len(diff) - _DIFF_UP_TO:,} characters more in environment.json"
    return flat


def notes(
    runs: Mapping[str, Path], histories: Mapping[str, History], configurations: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Warnings that limit the validity of the report."""
    found = []
    for name, history in histories.items():
        if not len(history):
            what = "is empty" if (runs[name] / METRICS).is_file() else "is missing"
            found.append(f"{name}: {METRICS} {what}, so there are no curves; the run may not have logged a step yet.")
        if history.torn:
            lines = numbered(history.torn, "line")
            found.append(f"{name}: {lines} of {METRICS} could not be read and are left out (a writer was killed).")
        broken = {key: int(np.isinf(column).sum()) for key, column in history.columns.items()}
        broken = {key: number for key, number in broken.items() if number}
        if broken:
            keys = ", ".join(f"{key} ({number:,})" for key, number in list(broken.items())[:6])
            found.append(f"{name}: values that are not finite, marked at the top of their charts: {keys}.")
        if (stage := report_of(runs[name])) is not None and stage.note:
            found.append(f"{name}: {stage.note}; the stage's own report, of {folder_of(runs[name])}, shows them.")
        found += [f"{name}: after the auxiliary stage, {line}." for line in (stage.silent if stage else ())]
        found += [f"{name}: {high}." for high in _unrouted_notes(history)]
        if len(history) and np.isnan(history.of("time")).all():
            found.append(f"{name}: lines without times; the wall clock is summed up from the times of steps.")
    return found + _vocabularies(histories, configurations) + evaluated_data_notes(histories, configurations)


def _vocabularies(histories: Mapping[str, History], configurations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning if vocabularies differ, because losses per token are then not comparable."""
    known = {name: _vocabulary(found) for name, found in configurations.items()}
    distinct = {words for words in known.values() if words}
    if len(distinct) > 1:
        each = "; ".join(f"{name} has {words}" for name, words in known.items() if words)
        return [f"The runs have different vocabularies, so their losses per token cannot be compared: {each}."]
    modalities = {tuple(sorted(modalities_of([history]))) for history in histories.values() if len(history)}
    if len(modalities) > 1:
        return ["The runs report different modalities; what one lacks is missing in its charts."]
    return []


def _vocabulary(found: Mapping[str, Any]) -> str:
    modalities = found.get("vocab.modalities")
    if not isinstance(modalities, list):
        return ""
    return ", ".join(f"{one.get('name')} {one.get('size')}" for one in modalities if isinstance(one, dict))


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _differing(some: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in some for key in one)
    return [key for key in keys if any(_known(one, key) != _known(some[0], key) for one in some[1:])]


def _known(values: Mapping[str, Any], key: str) -> Any:
    """A value; an empty section counts as missing, since the keys of another configuration's section are compared."""
    value = values.get(key)
    return None if value == {} else value
