"""When the first step of an attempt began, computed from its first logged line. No torch.

Between the "start" event and the first step an attempt computes a batch to find errors early and waits for other ranks.
`launch.goodput` and the timeline of a report count this time as start-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def first_step_began(lines: Iterable[Mapping[str, Any]], *, step: int, begun: float, end: float) -> float | None:
    """The time at which an attempt began its first step [seconds since 1970]; None: it has not logged a step yet.

    A line's time is the end of its step. Lines of old versions have no times: then it is `begun`.

    Args:
        lines: of metrics.jsonl that the attempt wrote, in order. A group of lines counts as one, with the time of the
            last one, the mean time of a step, and sums of pauses.
        step: the one after which the attempt began.
        begun: time of its "start" or "resume" event.
        end: time of its end, or now.
    """
    pauses = 0.0
    for line in lines:
        pauses += float(line.get("save_stall_s", 0.0)) + float(line.get("eval_s", 0.0))
        if "step_time_s" not in line:
            continue
        if not line.get("time"):
            return begun
        spent = (int(line["step"]) - step) * float(line["step_time_s"]) + pauses
        return min(end, max(begun, float(line["time"]) - spent))
    return None
