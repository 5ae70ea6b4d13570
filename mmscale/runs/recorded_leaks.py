"""What held-out documents of a run share with its training documents, from the event of its start. No torch.

`mmscale.data.prepared.leaks` makes the lines; an attempt prints them and writes them into the event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmscale.runs.events import BEGINS

FIELD = "leaks"  # of the event
_BEGIN, _END = 700, 300  # characters of a long line that are kept: the cause comes first, the remedy last


def leaks_in(events: Iterable[Mapping[str, Any]], *, step: int | None = None) -> list[str]:
    """The lines of a run's newest attempt; empty if there is nothing to say, or an older version wrote its events.

    Args:
        events: of events.jsonl, in order.
        step: only attempts that began up to this step; None: all.
    """
    found: Any = []
    for event in events:
        begun = event.get("step")
        if event.get("event") in BEGINS and (step is None or (isinstance(begun, int) and begun <= step)):
            found = event.get(FIELD, [])
    return [_shortened(line) for line in found if isinstance(line, str)] if isinstance(found, list) else []


def _shortened(line: str) -> str:
    return line if len(line) <= _BEGIN + _END else f"{line[:_BEGIN]} ... {line[-_END:]}"
