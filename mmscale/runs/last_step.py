"""The step that a run has reached: the last logged one, or that with which an attempt began or ended. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmscale.runs.events import BEGINS, ORDERLY_ENDS


def last_step(events: Iterable[Mapping[str, Any]], *, logged: int, attempt: int) -> int:
    """The last step of a run's newest attempt. What a killed attempt did after its last logged step is not known.

    Args:
        events: of events.jsonl, in order.
        logged: the last step in metrics.jsonl; 0: none.
        attempt: the attempt that logged it.
    """
    found, newest = logged, attempt
    for event in events:
        step, number = event.get("step"), event.get("attempt", 0)
        if event.get("event") not in (*BEGINS, *ORDERLY_ENDS) or type(step) is not int or type(number) is not int:
            continue
        if number > newest:
            found, newest = step, number
        elif number == newest:
            found = max(found, step)
    return found
