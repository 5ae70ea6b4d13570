"""Charts of the accuracies of tasks that were evaluated during runs: one for each task, with a line for guessing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmscale.report.chart import Chart, Level, Line, mark_of
from mmscale.report.history import History
from mmscale.runs.events import BEGINS
from mmscale.runs.held_out import ACCURACY, HeldOut


@dataclass(frozen=True)
class Guessing:
    """The accuracy of guessing during some steps of a run.

    Attributes:
        value: the accuracy.
        first: the step from which it holds.
        last: the step after which other questions were asked; None: it holds to the end.
    """

    value: float
    first: int
    last: int | None = None


def guessing_of(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Guessing]]:
    """The accuracy of guessing by task, in the order of steps, from the start events of a run's attempts.

    A task without choices has none, and neither have runs of earlier versions.
    """
    known: dict[int, dict[str, float]] = {}  # by step
    for event in events:
        step = event.get("step")
        if event.get("event") not in BEGINS or type(step) is not int:
            continue
        known = {at: values for at, values in known.items() if at < step}  # later steps are repeated
        given = event.get("guessing")
        chances = given.items() if isinstance(given, dict) else ()
        known[step] = {str(name): float(value) for name, value in chances if isinstance(value, int | float)}
    found: dict[str, list[Guessing]] = {}
    for name in dict.fromkeys(name for values in known.values() for name in values):
        spans: list[tuple[int, float | None]] = []
        for step, values in known.items():
            if not spans or spans[-1][1] != values.get(name):
                spans.append((step, values.get(name)))
        ends: list[int | None] = [step for step, _ in spans[1:]]
        found[name] = [
            Guessing(value, first, last)
            for (first, value), last in zip(spans, [*ends, None], strict=True)
            if value is not None
        ]
    return found


def accuracy_charts(
    names: Sequence[str], histories: Sequence[History], guessing: Sequence[Mapping[str, Sequence[Guessing]]] = ()
) -> list[Chart]:
    """One chart for each task that was evaluated during a run.

    Args:
        names: of the runs.
        histories: of the runs, in the same order.
        guessing: of the runs, in the same order, from `guessing_of`; empty: unknown.
    """
    measured = {key: HeldOut.of(key) for history in histories for key in history.columns}
    figures = dict.fromkeys(one.figure for one in measured.values() if one and one.figure.startswith(ACCURACY))
    charts = []
    for figure in figures:
        lines = []
        for run, history in enumerate(histories):
            prefix = "" if len(names) == 1 else f"{names[run]}, "
            lines += [
                Line(run, key, _label(prefix, one, history), run, points=True, mark=mark_of(one))
                for key, one in measured.items()
                if key in history.columns and one and one.figure == figure and not one.name
            ]
        task = figure.removeprefix(ACCURACY)
        note = "Share of questions answered right. mmscale eval prints the 95 % interval."
        title, levels = f"Accuracy: {task}", _levels(names, [one.get(task, ()) for one in guessing])
        charts.append(Chart(f"accuracy_{task}", "Loss", title, note=note, zero=True, lines=tuple(lines), levels=levels))
    return charts


def _label(prefix: str, measured: HeldOut, history: History) -> str:
    """The run and the routing mode; `held out` if there is neither to name."""
    how = measured.how(routed=history.routes)
    return f"{prefix}{how}" if how else prefix.removesuffix(", ") or "held out"


def _levels(names: Sequence[str], guessing: Sequence[Sequence[Guessing]]) -> tuple[Level, ...]:
    """A line for each different value; runs with the same one share it."""
    shared = len({tuple(spans) for spans in guessing if spans}) == 1
    levels = [
        Level(run, one.value, "guessing" if shared else f"{names[run]}, guessing", one.first, one.last)
        for run, spans in enumerate(guessing)
        for one in spans
    ]
    first = next((level.run for level in levels), 0)
    return tuple(level for level in levels if not shared or level.run == first)
