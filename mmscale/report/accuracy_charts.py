"""Charts of the accuracies of tasks that were evaluated during runs: one chart for each task."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.report.chart import Chart, Line, mark_of
from mmscale.report.history import History
from mmscale.runs.held_out import ACCURACY, HeldOut


def accuracy_charts(names: Sequence[str], histories: Sequence[History]) -> list[Chart]:
    """One chart for each task that was evaluated during a run.

    Args:
        names: of the runs.
        histories: of the runs, in the same order.
    """
    measured = {key: HeldOut.of(key) for history in histories for key in history.columns}
    figures = dict.fromkeys(one.figure for one in measured.values() if one and one.figure.startswith(ACCURACY))
    charts = []
    for figure in figures:
        lines = []
        for run, history in enumerate(histories):
            prefix = "" if len(names) == 1 else f"{names[run]}, "
            lines += [
                Line(run, key, f"{prefix}{one.how}", run, points=True, mark=mark_of(one))
                for key, one in measured.items()
                if key in history.columns and one and one.figure == figure and not one.name
            ]
        task = figure.removeprefix(ACCURACY)
        note = "Questions answered right. mmscale eval gives the 95 % interval, and what guessing gets."
        title = f"Accuracy: {task}"
        charts.append(Chart(f"accuracy_{task}", "Loss", title, note=note, zero=True, lines=tuple(lines)))
    return charts
