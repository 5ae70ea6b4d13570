"""Which part of a held-out set a run's figures were measured on (`train.eval_batches`), for tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.report.chart import Chart
from mmscale.report.history import History
from mmscale.runs.events import read_events
from mmscale.runs.extents import Extent, extents_in
from mmscale.runs.held_out import ACCURACY, HeldOut, words_of
from mmscale.train.stages.origin import folder_of


@dataclass(frozen=True)
class HeldOutParts:
    """The parts of held-out sets that the attempts of a run and of its auxiliary stage read.

    Attributes:
        attempts: by attempt and name of the set; attempts of versions that did not record it are missing.
        stage: of the newest attempt of the auxiliary stage, by name of the set.
    """

    attempts: Mapping[int, Mapping[str, Extent]] = field(default_factory=dict)
    stage: Mapping[str, Extent] = field(default_factory=dict)

    @classmethod
    def of_run(cls, run: Path, events: Iterable[Mapping[str, Any]]) -> HeldOutParts:
        """Read them.

        Args:
            run: its folder.
            events: its events.
        """
        stage = extents_in(read_events(folder_of(run)))
        return cls(extents_in(events), stage[max(stage)] if stage else {})

    def of(self, history: History, key: str, *, row: int | None = None) -> Extent | None:
        """The part on which a figure was measured; None: it is not of held-out data, or the part is not known.

        Args:
            history: of the run.
            key: the figure's column.
            row: the measurement's row; None: the latest.
        """
        measured = HeldOut.of(key)
        if measured is None or measured.figure.startswith(ACCURACY):  # questions are all asked
            return None
        if measured.stage:
            return self.stage.get(measured.name)
        rows = np.flatnonzero(~np.isnan(history.of(key)))
        if not len(rows):
            return None
        attempt = history.of("attempt")[rows[-1] if row is None else row]
        return self.attempts.get(int(attempt), {}).get(measured.name) if np.isfinite(attempt) else None

    def over_time(self, history: History, key: str) -> list[tuple[int, Extent]]:
        """The parts on which the values of a curve were measured, in order, each with the last step that has it.

        Args:
            history: of the run.
            key: the figure's column.
        """
        found: list[tuple[int, Extent]] = []
        for row in np.flatnonzero(~np.isnan(history.of(key))).tolist():
            if (extent := self.of(history, key, row=row)) is None:
                continue
            if found and found[-1][1] == extent:
                found.pop()
            found.append((int(history.steps[row]), extent))
        return found

    def partial(self, history: History) -> bool:
        """Whether any figure was measured on a part of its set."""
        return any(one.partial for key in history.columns for _, one in self.over_time(history, key))

    def words(self, history: History, key: str, *, row: int | None = None, whole: bool = False) -> str:
        """`, first 2 of 24 batches`; empty if it is not known.

        Args:
            history: of the run.
            key: the figure's column.
            row: as for `of`.
            whole: also say `, all 24 batches`.
        """
        found = self.of(history, key, row=row)
        said = "" if found is None else found.words if whole else str(found)
        return said and f", {said}"

    def words_over_time(self, history: History, key: str, *, whole: bool = False) -> str:
        """As `words`, of a curve: `, first 2 of 24 batches up to step 100, then all 7 batches`."""
        found = self.over_time(history, key)
        if not whole and not any(one.partial for _, one in found):
            return ""
        return f", {_over_time([(step, one.words) for step, one in found])}" if found else ""


def with_parts(charts: Sequence[Chart], runs: Mapping[str, History], parts: Sequence[HeldOutParts]) -> list[Chart]:
    """Charts whose notes say on which part of a held-out set they were measured, if on a part.

    Args:
        charts: of the runs.
        runs: histories by name.
        parts: of the runs, in the same order; empty: unknown.
    """
    return [_with_parts(chart, runs, parts) for chart in charts] if parts else list(charts)


def _with_parts(chart: Chart, runs: Mapping[str, History], parts: Sequence[HeldOutParts]) -> Chart:
    names, histories = list(runs), list(runs.values())
    found: dict[tuple[int, str, str], list[tuple[int, Extent]]] = {}  # by run, set and stage
    for line in chart.lines:
        own, measured = parts[line.run].over_time(histories[line.run], line.key), HeldOut.of(line.key)
        if own and measured is not None:
            found.setdefault((line.run, measured.name, measured.stage), own)
    if not any(extent.partial for own in found.values() for _, extent in own):
        return chart
    for (run, name, stage), own in list(found.items()):
        if stage and (main := found.get((run, name, ""))) and main[-1][1] == own[-1][1]:
            del found[run, name, stage]  # as the run's own newest values
    said = list(dict.fromkeys(_over_time([(step, one.noun) for step, one in own]) for own in found.values()))
    if len(said) == 1:
        note = f"Held-out values are of {said[0]}."
    else:
        stages = len({stage for _, _, stage in found}) > 1
        each = [
            f"{_label(names[run] if len(names) > 1 else '', name, stage if stages else '')}, "
            f"{_over_time([(step, one.words) for step, one in own])}"
            for (run, name, stage), own in found.items()
        ]
        note = f"Held-out values: {'; '.join(each)}."
    return replace(chart, note=f"{chart.note} {note}".strip())


def _over_time(parts: Sequence[tuple[int, str]]) -> str:
    """`the first 3 of 11 batches up to step 120, then the first 3 of 7 batches`."""
    *earlier, (_, last) = parts
    return ", then ".join([*(f"{words} up to step {step:,}" for step, words in earlier), last])


def _label(run: str, name: str, stage: str) -> str:
    data = words_of(name) or ("" if run else "held-out split")
    return ", ".join(filter(None, (run, data, stage and f"{stage} stage")))
