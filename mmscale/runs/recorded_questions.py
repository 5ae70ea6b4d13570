"""How many questions each task of a run has, and where they are from: from the events of its attempts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.runs.events import BEGINS

FIELD = "questions"  # of the event of an attempt's start


@dataclass(frozen=True)
class Asked:
    """The questions of a task.

    Attributes:
        number: of the questions.
        place: the data set or the file that they come from.
    """

    number: int
    place: str


def as_field(asked: Mapping[str, Asked]) -> dict[str, Any]:
    """The field of the event of an attempt's start; empty without tasks.

    Args:
        asked: by name of the task.
    """
    return {FIELD: {name: {"number": one.number, "place": one.place} for name, one in asked.items()}} if asked else {}


def questions_in(events: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Asked]]:
    """Questions by attempt and name of the task; attempts of versions that did not record them are left out.

    Args:
        events: of events.jsonl, in order.
    """
    found: dict[int, dict[str, Asked]] = {}
    for event in events:
        attempt, given = event.get("attempt"), event.get(FIELD)
        if event.get("event") not in BEGINS or type(attempt) is not int or not isinstance(given, dict):
            continue
        try:
            asked = {str(name): Asked(int(one["number"]), str(one["place"])) for name, one in given.items()}
        except (KeyError, TypeError, ValueError):
            continue  # not written by a run
        found[attempt] = {name: one for name, one in asked.items() if one.number > 0}
    return found
