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

    def partial(self, history: History) -> bool:
        """Whether any latest figure was measured on a part of its set."""
        found = (self.of(history, key) for key in history.columns)
        return any(one is not None and one.partial for one in found)

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
    found: dict[tuple[int, str, str], Extent] = {}  # by run, set and stage
    for line in chart.lines:
        extent, measured = parts[line.run].of(histories[line.run], line.key), HeldOut.of(line.key)
        if extent is not None and measured is not None:
            found[line.run, measured.name, measured.stage] = extent
    if not any(extent.partial for extent in found.values()):
        return chart
    said = list(dict.fromkeys(extent.noun for extent in found.values()))
    if len(said) == 1:
        note = f"Held-out values are of {said[0]}."
    else:
        stages = len({stage for _, _, stage in found}) > 1
        each = [
            f"{_label(names[run] if len(names) > 1 else '', name, stage if stages else '')}, {extent.words}"
            for (run, name, stage), extent in found.items()
        ]
        note = f"Held-out values: {'; '.join(each)}."
    return replace(chart, note=f"{chart.note} {note}".strip())


def _label(run: str, name: str, stage: str) -> str:
    data = words_of(name) or ("" if run else "held-out split")
    return ", ".join(filter(None, (run, data, stage and f"{stage} stage")))
