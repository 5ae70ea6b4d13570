"""Breaks of a run's curves.

Finds the steps after which losses are not comparable with earlier ones, because data, batches or sequences changed.
Reads events and configurations; downsample.py cuts the curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.report.facts import changes
from mmscale.runs.breaks import Break, break_of


@dataclass(frozen=True)
class Cut:
    """A place where curves are interrupted.

    Attributes:
        step: the last step before it.
        text: what changed there.
        broken: which curves are interrupted.
    """

    step: int
    text: str
    broken: Break

    def breaks(self, key: str) -> bool:
        """Whether the curve of a column is interrupted here."""
        return self.broken.breaks(key)


def cuts_of(run: Path, events: Sequence[Mapping[str, Any]], *, name: str = "") -> list[Cut]:
    """Breaks of a run in the order of its steps, without those whose later steps were all rolled back.

    Args:
        run: its folder; for runs of earlier versions changes are found by comparing the configurations of attempts.
        events: of events.jsonl.
        name: of the run, for the texts of a report with several; "": it is the only one.
    """
    found: dict[int, Break] = {}
    by_attempt: dict[Any, list[str]] = {}
    for attempt, key, *_ in changes(run):
        by_attempt.setdefault(attempt, []).append(key)
    for event in events:
        step = event.get("step")
        if event.get("event") != "resume" or type(step) is not int:
            continue
        for later in [one for one in found if one > step]:  # these steps are repeated
            del found[later]
        lines = event.get("changed")
        known = lines if isinstance(lines, list) else by_attempt.get(event.get("attempt"), [])
        one = break_of([str(line) for line in known])
        if step > 0 and (one.what or one.rate):
            found[step] = found.get(step, Break()) | one
    return [_cut(step, one, name=name) for step, one in sorted(found.items())]


def _cut(step: int, one: Break, *, name: str) -> Cut:
    text = f"{name} changed: {', '.join(one.what) or 'learning rate'}".strip()
    return Cut(step, text, one)


def steps_of(cuts: Sequence[Cut], key: str) -> tuple[int, ...]:
    """The steps after which a column's curve is interrupted."""
    return tuple(cut.step for cut in cuts if cut.breaks(key))
