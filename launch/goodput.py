"""Goodput: the share of allocated time spent in steps that count.

Computes where the time of a run went, from its events and metrics. Pure arithmetic; it measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmscale.runs.display_names import TIME_PARTS
from mmscale.runs.events import BEGINS, ORDERLY_ENDS
from mmscale.runs.first_step import first_step_began


def goodput(
    events: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    *,
    now: float,
    resumes_from: int | None = None,
) -> tuple[float | None, dict[str, float]]:
    """Productive time over allocated time, and the time of each part.

    An attempt starts with its "launch" event (the first attempt of a job with the start of the job, `since`); without a
    launcher, with the start of its process, the `since` of "start" or "resume". It ends with its last event or line, or
    now. The time until its first step is start-up (of a running attempt until now if it has logged no step). The rest
    is steps, save stalls and evaluation. Steps after the checkpoint from which the next attempt resumes are lost, and
    so is the rest of an attempt that was killed or crashed. The rest of an attempt that saved its last step and ended
    in order (logging, leaving the ranks) is "other". Between attempts the run waits.

    Args:
        events: of events.jsonl, in order.
        metrics: lines of metrics.jsonl in file order: repeated steps occur twice.
        now: seconds since 1970; the end of an attempt that has not recorded its end.
        resumes_from: of a run that does not run, the step from which the next start would continue, as after a resume:
            later steps of an attempt that did not end in order are lost. None: it runs, or that is not known.

    Returns:
        The share, None without an attempt; and seconds by part.
    """
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        attempts.setdefault(int(event.get("attempt", 0)), []).append(event)
    order = [number for number in sorted(attempts) if any(_begins(event) for event in attempts[number])]
    lines: dict[Any, list[Mapping[str, Any]]] = {}
    for line in metrics:
        lines.setdefault(line.get("attempt"), []).append(line)
    resumed = _resumed_from(attempts, order)
    times = dict.fromkeys(TIME_PARTS, 0.0)
    previous_end: float | None = None
    for place, number in enumerate(order):
        mine = attempts[number]
        first = next(event for event in mine if _begins(event))
        begin = first.get("since", first["time"])
        ended = next((e for e in reversed(mine) if e["event"] in ORDERLY_ENDS), None)
        over = ended is not None or any(e["event"] in ("ranks_ended", "gave_up") for e in mine)
        over = over or place + 1 < len(order) or resumes_from is not None
        # A killed attempt has no event of its end: it lived at least until its last line.
        known = [float(line["time"]) for line in lines.get(number, []) if "time" in line]
        end = max(mine[-1]["time"], begin, *known) if over else max(now, begin)
        if previous_end is not None:
            times["waiting"] += max(0.0, begin - previous_end)
        previous_end = end
        begun = next((event for event in mine if event["event"] in BEGINS), None)
        if begun is None:
            times["start_up"] += end - begin
            continue
        own, step = lines.get(number, []), int(begun.get("step", 0))
        stepping = first_step_began(own, step=step, begun=begun["time"], end=end)
        if stepping is None:
            stepping = begun["time"] if over else end
        times["start_up"] += stepping - begin
        next_step = resumes_from if ended is None and number == order[-1] else resumed[number]
        stopped = None if ended is None or "step" not in ended else int(ended["step"])
        _split(
            # The last steps, save and evaluation come after the last logged step: the event of the end has their time.
            [*own, *([] if ended is None else [_unlogged(ended)])],
            first=step,
            counts_up_to=next_step,
            saved=stopped if next_step is None else next_step,
            seconds=end - stepping,
            rest="steps" if not over else "lost" if ended is None else "other",
            times=times,
        )
    allocated = sum(seconds for part, seconds in times.items() if part != "waiting")
    return (times["steps"] / allocated if allocated > 0 else None), times


def _begins(event: Mapping[str, Any]) -> bool:
    return event["event"] in ("launch", *BEGINS)


def _unlogged(event: Mapping[str, Any]) -> dict[str, Any]:
    """The end of an attempt as a line of metrics; older versions recorded pauses only."""
    return {name: event[name] for name in ("step", "step_time_s", "save_stall_s", "eval_s") if name in event}


def _resumed_from(attempts: Mapping[int, Sequence[Mapping[str, Any]]], order: Sequence[int]) -> dict[int, int | None]:
    """For each attempt, the step from which the next started attempt resumed; None if there is none."""
    found: dict[int, int | None] = {}
    step: int | None = None
    for number in reversed(order):
        found[number] = step
        begun = next((event for event in attempts[number] if event["event"] in BEGINS), None)
        step = step if begun is None else int(begun.get("step", 0))
    return found


def _split(
    lines: Sequence[Mapping[str, Any]],
    *,
    first: int,
    counts_up_to: int | None,
    saved: int | None,
    seconds: float,
    rest: str,
    times: dict[str, float],
) -> None:
    """Add one attempt's seconds after its start-up to the parts.

    Steps between the last line and the `saved` one also count, at the pace of the steps before. `rest` is the
    part that gets the remaining time: of a running attempt the step in progress; of an ended one lost work, an
    unnoticed fault, or the orderly exit.
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
    times["lost"] += min(lost, seconds - spent)
    times[rest] += max(0.0, seconds - spent - lost)
