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
from mmscale.runs.events import BEGINS, CUT_SHORT
from mmscale.runs.extents import extents_before, extents_in, other_parts


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

    If a stop request interrupted the evaluation after the last step before a change, the attempt after the change has
    made it: held-out curves are broken before that step then, and those of training after it.

    Args:
        run: its folder; for runs of earlier versions changes are found by comparing the configurations of attempts.
        events: of events.jsonl.
        name: of the run, for the texts of a report with several; "": it is the only one.
    """
    found: dict[tuple[int, bool], Break] = {}  # by the step of the resume, and whether its evaluation follows it
    by_attempt: dict[Any, list[str]] = {}
    for attempt, key, *_ in changes(run):
        by_attempt.setdefault(attempt, []).append(key)
    recorded = extents_in(events)
    begins: list[Mapping[str, Any]] = []
    postponed: set[int] = set()  # steps whose evaluation a stop request interrupted; the next attempt makes it
    for event in events:
        step = event.get("step")
        if event.get("event") == CUT_SHORT and type(step) is int:
            postponed.add(step)
        if event.get("event") not in BEGINS:
            continue
        begins.append(event)
        if event.get("event") != "resume" or type(step) is not int:
            continue
        for later in [one for one in found if one[0] > step]:  # these steps are repeated
            del found[later]
        lines = event.get("changed")
        known = lines if isinstance(lines, list) else by_attempt.get(event.get("attempt"), [])
        now = recorded.get(event.get("attempt", 0))
        parts = None if now is None else other_parts(extents_before(begins[:-1], step), now)
        one = break_of([str(line) for line in known], parts=parts)
        after = step in postponed
        postponed.discard(step)
        for evaluated, part in ((after, one.of_held_out), (False, one.of_training)) if after else ((False, one),):
            if step > 0 and (part.what or part.rate):
                found[step, evaluated] = found.get((step, evaluated), Break()) | part
    return [_cut(step - evaluated, one, name=name) for (step, evaluated), one in sorted(found.items(), key=_place)]


def _place(found: tuple[tuple[int, bool], Break]) -> int:
    (step, evaluated), _ = found
    return step - evaluated


def _cut(step: int, one: Break, *, name: str) -> Cut:
    text = f"{name} changed: {', '.join(one.what) or 'learning rate'}".strip()
    return Cut(step, text, one)


def steps_of(cuts: Sequence[Cut], key: str) -> tuple[int, ...]:
    """The steps after which a column's curve is interrupted."""
    return tuple(cut.step for cut in cuts if cut.breaks(key))
