"""How much of each held-out set an evaluation reads, in words and in the event of an attempt's start. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmscale.runs.events import BEGINS
from mmscale.wording import numbered

FIELD = "extents"  # of the event


@dataclass(frozen=True)
class Extent:
    """How much of a set an evaluation reads.

    Attributes:
        batches: number of global batches that are read, from the beginning of the pass.
        available: number of global batches in the whole set.
    """

    batches: int
    available: int

    @property
    def partial(self) -> bool:
        """Whether a part of the set is not read."""
        return self.batches < self.available

    @property
    def words(self) -> str:
        """In words, also if the whole set is read."""
        return str(self) or f"all {numbered(self.available, 'batch', 'batches')}"

    @property
    def noun(self) -> str:
        """`the first 2 of 24 batches`, `all 24 batches`."""
        return f"the {self}" if self.partial else self.words

    def __str__(self) -> str:
        """In words, if the set is read only partly; otherwise empty."""
        return f"first {self.batches} of {self.available} batches" if self.partial else ""


def as_field(extents: Mapping[str, Extent]) -> dict[str, Any]:
    """The field of the event of an attempt's start; empty without held-out sets.

    Args:
        extents: by the name of the set, as in `HeldOut`.
    """
    return {FIELD: {name: asdict(one) for name, one in extents.items()}} if extents else {}


def extents_before(events: Iterable[Mapping[str, Any]], step: int) -> dict[str, Extent] | None:
    """Those of the attempt that wrote the checkpoint of a step: the newest one that began before it. None: unknown.

    Args:
        events: of events.jsonl, in order, up to the resume from that checkpoint.
        step: of the checkpoint.
    """
    begins = [event for event in events if event.get("event") in BEGINS]
    before = [event for event in begins if type(event.get("step")) is int and event["step"] < step]
    return extents_in(before[-1:]).get(before[-1].get("attempt", 0)) if before else None


def other_parts(before: Mapping[str, Extent] | None, now: Mapping[str, Extent]) -> set[str] | None:
    """Names of the sets of which an attempt reads other batches than the attempt before it; None: unknown.

    Args:
        before: of the attempt before, from `extents_before`.
        now: of this attempt. A set that is new is not among the names.
    """
    return None if before is None else {name for name, one in now.items() if before.get(name, one) != one}


def extents_in(events: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Extent]]:
    """Extents by attempt and name of the set; attempts of versions that did not record them are left out.

    Args:
        events: of events.jsonl, in order.
    """
    found: dict[int, dict[str, Extent]] = {}
    for event in events:
        attempt, given = event.get("attempt"), event.get(FIELD)
        if event.get("event") not in BEGINS or type(attempt) is not int or not isinstance(given, dict):
            continue
        try:
            found[attempt] = {
                str(name): Extent(int(one["batches"]), int(one["available"])) for name, one in given.items()
            }
        except (KeyError, TypeError, ValueError):
            continue  # not written by a run
    return found
