# Where the time of a run went, from its events and metrics alone: pure arithmetic, nothing is measured here.
"""Goodput: the share of allocated time that went into steps which count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PARTS = ("start_up", "steps", "save_stall", "evaluation", "lost", "waiting")


def goodput(
    events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], *, now: float
) -> tuple[float | None, dict[str, float]]:
    """Productive time over allocated time, and where all of the time went.

    An attempt's time begins with its "launch" event, the first one of a job with the job (`since`), and ends with its
    last event or now. Up to "start" or "resume" it is start-up. What follows is steps, save stalls and evaluation;
    steps beyond the point from which the next attempt goes on are lost, with all that came after the last step that
    counts. Between attempts the run waits.

    Args:
        events: of events.jsonl, in order.
        metrics: lines of metrics.jsonl as they were written: a re-done step is there twice.
        now: seconds since 1970; the end of an attempt that still runs.

    Returns:
        The share, None without an attempt; and seconds by part.
    """
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        attempts.setdefault(int(event.get("attempt", 0)), []).append(event)
    order = [number for number in sorted(attempts) if any(e["event"] == "launch" for e in attempts[number])]
    lines: dict[Any, list[Mapping[str, Any]]] = {}
    for line in metrics:
        lines.setdefault(line.get("attempt"), []).append(line)
    resumed = _resumed_from(attempts, order)
    times = dict.fromkeys(PARTS, 0.0)
    previous_end: float | None = None
    for place, number in enumerate(order):
        mine = attempts[number]
        launched = next(e for e in mine if e["event"] == "launch")
        begin = launched.get("since", launched["time"])
        over = any(e["event"] in ("ranks_ended", "gave_up") for e in mine) or place + 1 < len(order)
        end = max(mine[-1]["time"], begin) if over else max(now, begin)
        if previous_end is not None:
            times["waiting"] += max(0.0, begin - previous_end)
        previous_end = end
        begun = next((e for e in mine if e["event"] in ("start", "resume")), None)
        if begun is None:
            times["start_up"] += end - begin
            continue
        times["start_up"] += begun["time"] - begin
        next_step = resumed[number]
        stopped = next((int(e["step"]) for e in mine if e["event"] in ("stop", "finish") and "step" in e), None)
        _split(
            lines.get(number, []),
            first=int(begun.get("step", 0)),
            counts_up_to=next_step,
            saved=stopped if next_step is None else next_step,
            seconds=end - begun["time"],
            over=over,
            times=times,
        )
    allocated = sum(seconds for part, seconds in times.items() if part != "waiting")
    return (times["steps"] / allocated if allocated > 0 else None), times


def _resumed_from(attempts: Mapping[int, Sequence[Mapping[str, Any]]], order: Sequence[int]) -> dict[int, int | None]:
    """By attempt, the step after which the next one that has begun went on; None if none has."""
    found: dict[int, int | None] = {}
    step: int | None = None
    for number in reversed(order):
        found[number] = step
        begun = next((event for event in attempts[number] if event["event"] in ("start", "resume")), None)
        step = step if begun is None else int(begun.get("step", 0))
    return found


def _split(
    lines: Sequence[Mapping[str, Any]],
    *,
    first: int,
    counts_up_to: int | None,
    saved: int | None,
    seconds: float,
    over: bool,
    times: dict[str, float],
) -> None:
    """Add one attempt's seconds after its start-up to the parts.

    Steps between the last logged one and the one that was `saved` count too, at the pace of those before.
    """
    stall = sum(float(line.get("save_stall_s", 0.0)) for line in lines)
    evaluation = sum(float(line.get("eval_s", 0.0)) for line in lines)
    steps = lost = pace = 0.0
    last = first
    for line in lines:
        if "step_time_s" not in line:
            continue
        step = int(line["step"])
        done = max(0, step - last)
        good = done if counts_up_to is None else max(0, min(step, counts_up_to) - last)
        pace = float(line["step_time_s"])
        steps += good * pace
        lost += (done - good) * pace
        last = max(last, step)
    if saved is not None and saved > last:
        steps += min((saved - last) * pace, max(0.0, seconds - steps - lost - stall - evaluation))
    spent = min(seconds, steps + stall + evaluation)
    scale = 1.0 if steps + stall + evaluation <= seconds else seconds / (steps + stall + evaluation)
    times["steps"] += steps * scale
    times["save_stall"] += stall * scale
    times["evaluation"] += evaluation * scale
    rest = seconds - spent
    # Of an attempt that runs the rest is the step that is being computed; of one that is over, work that was lost, a
    # fault that was not noticed yet, and the way out.
    times["lost" if over else "steps"] += rest
