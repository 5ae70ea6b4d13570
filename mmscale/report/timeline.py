"""The timeline of a run: attempts, saves, faults, and lost work.

Collects the attempts of a run, why they ended, and how its time was used. The caller passes the function that computes
goodput.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mmscale.report.history import Floats, History
from mmscale.runs.display_names import field_in_words, in_words
from mmscale.runs.events import BEGINS, ORDERLY_ENDS, ROUTINE
from mmscale.runs.first_step import first_step_began
from mmscale.wording import numbered

Event = Mapping[str, Any]
_ENDS = (*ORDERLY_ENDS, "fault", "ranks_ended", "gave_up")
_DRAWN = 300  # largest number of events of each kind in a picture
_NAMED = 6  # names of events in the legend
_GROUPS = 400  # groups of an attempt's lines, for computing goodput


class Goodput(Protocol):
    """`launch.goodput.goodput`."""

    def __call__(
        self, events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], *, now: float
    ) -> tuple[float | None, dict[str, float]]:
        """Share of allocated time in steps that count, and seconds by part."""


@dataclass(frozen=True)
class Span:
    """A part of an attempt.

    Attributes:
        begin, end: hours since the run's first event.
        kind: start_up, steps, or lost (repeated by a later attempt).
        attempt: its number.
    """

    begin: float
    end: float
    kind: str
    attempt: int


@dataclass(frozen=True)
class TimelineEvent:
    """An event.

    Attributes:
        hours: since the run's first event.
        attempt, step: of the event; step is None if the event has none.
        event: its name.
        text: its other fields, for people.
        routine: occurs in every run.
    """

    hours: float
    attempt: int
    step: int | None
    event: str
    text: str
    routine: bool


@dataclass(frozen=True)
class Timeline:
    """Attempts and events of a run.

    Attributes:
        spans: parts of attempts, in order.
        events: in order.
        goodput: share of the time that was spent in steps that count; None if unknown.
        seconds: by part of the time.
        measured_start: whether times before "start" are known; in runs of earlier versions without a launcher they are
            not.
    """

    spans: list[Span] = field(default_factory=list)
    events: list[TimelineEvent] = field(default_factory=list)
    goodput: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    measured_start: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries, with the events that are drawn."""
        return asdict(replace(self, events=self.drawn())) | {"crosses": crosses(self.events)}

    def drawn(self) -> list[TimelineEvent]:
        """At most 300 events of each kind, evenly chosen and including the first and the last, for pictures."""
        by_name: dict[str, list[TimelineEvent]] = {}
        for one in self.events:
            by_name.setdefault(one.event, []).append(one)
        places = [
            np.unique(np.linspace(0, len(some) - 1, min(_DRAWN, len(some))).astype(int)) for some in by_name.values()
        ]
        chosen = [some[int(place)] for some, own in zip(by_name.values(), places, strict=True) for place in own]
        return sorted(chosen, key=lambda one: one.hours)


def crosses(events: Iterable[TimelineEvent]) -> str:
    """What the red crosses stand for: the names of events that are not routine; empty without such events."""
    found = list(dict.fromkeys(in_words(one.event) for one in events if not one.routine))
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {numbered(more, 'other event')}" if more > 0 else "")


def timeline_of(events: Sequence[Event], history: History, *, begin: float, goodput: Goodput) -> Timeline:
    """The timeline of a run.

    Args:
        events: of events.jsonl.
        history: its metrics; their lines show which work was lost.
        begin: when the run began [seconds since 1970].
        goodput: function that computes goodput.
    """
    events = [event for event in events if isinstance(event.get("time"), int | float) and "event" in event]
    if not events:
        return Timeline()
    whole = _with_ends(events, history)
    now = max(float(event["time"]) for event in whole)
    share, seconds = goodput(whole, _condensed(whole, history), now=now)
    return Timeline(
        spans=[
            Span((a - begin) / 3600, (b - begin) / 3600, kind, n) for a, b, kind, n in _spans(whole, history) if b > a
        ],
        events=_timeline_events(events, history, begin=begin),
        goodput=share,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        measured_start=any(event["event"] == "launch" or "since" in event for event in events),
    )


def _with_ends(events: Sequence[Event], history: History) -> list[Event]:
    """Adds events so that every attempt begins with "launch" and ends no sooner than its last logged step.

    Without a launcher an attempt begins `since` the start of its process, and a killed one has no event for its end.
    """
    last: dict[int, float] = {}
    times, attempts = history.lines.columns.get("time", np.zeros(0)), history.lines.attempt
    for attempt in np.unique(attempts):
        own = times[(attempts == attempt) & np.isfinite(times)]
        if len(own):
            last[int(attempt)] = float(own.max())
    by_attempt: dict[int, list[Event]] = {}
    for event in events:
        by_attempt.setdefault(_attempt(event), []).append(event)
    whole: list[Event] = []
    for attempt, mine in sorted(by_attempt.items()):
        if not any(event["event"] == "launch" for event in mine):
            began = min(float(event.get("since", event["time"])) for event in mine)
            whole.append({"time": began, "attempt": attempt, "event": "launch"})
        whole += mine
        if last.get(attempt, 0.0) > float(mine[-1]["time"]):
            whole.append({"time": last[attempt], "attempt": attempt, "event": "last_step"})
    return whole


def _condensed(events: Sequence[Event], history: History) -> list[dict[str, Any]]:
    """Lines of each attempt in groups, with the sums needed for computing goodput.

    A group ends where a later attempt resumes, so that repeated steps are not counted twice.
    """
    begun = {_attempt(e): float(e.get("step", 0)) for e in events if e["event"] in BEGINS}
    newest: dict[float, int] = {}  # by step, the last of the attempts that resume after it
    for attempt, step in begun.items():
        newest[step] = max(newest.get(step, 0), attempt)
    starts = np.array(sorted(newest))
    begins = np.array([newest[step] for step in starts])
    lines = history.lines
    found: list[dict[str, Any]] = []
    for attempt in np.unique(lines.attempt):
        rows = np.flatnonzero(lines.attempt == attempt)
        reached = np.maximum.accumulate(np.concatenate(([begun.get(int(attempt), 0.0)], lines.step[rows])))
        columns = {name: np.nan_to_num(values[rows], posinf=0.0, neginf=0.0) for name, values in lines.columns.items()}
        timed = ~np.isnan(lines.columns["step_time_s"][rows])
        done = np.where(timed, np.diff(reached), 0.0)
        edges = np.linspace(0, len(rows), min(_GROUPS, len(rows)) + 1).astype(np.int64)
        within = slice(*np.searchsorted(starts, (reached[0], reached[-1])))
        later = starts[within][begins[within] > attempt]
        first = np.flatnonzero(timed)[:1] + 1  # a group ends with the first step, which tells when steps began
        edges = np.unique(np.concatenate((edges, first, np.searchsorted(reached[1:], later, side="right"))))
        for begin, end in itertools.pairwise(edges):
            part = slice(int(begin), int(end))
            number = float(done[part].sum())
            line: dict[str, Any] = {"step": int(reached[end]), "attempt": int(attempt)}
            line |= {name: float(columns[name][part].sum()) for name in ("save_stall_s", "eval_s")}
            spent = lines.columns["time"][rows][part]
            line |= {"time": float(np.nanmax(spent))} if np.isfinite(spent).any() else {}
            if number > 0:
                line["step_time_s"] = float((done[part] * columns["step_time_s"][part]).sum() / number)
            found.append(line)
    return found


def _spans(events: Sequence[Event], history: History) -> list[tuple[float, float, str, int]]:
    by_attempt: dict[int, list[Event]] = {}
    for event in events:
        by_attempt.setdefault(_attempt(event), []).append(event)
    counts_up_to: dict[int, int | None] = {}  # by attempt, the step from which a later one resumes
    least: int | None = None
    for attempt in sorted(by_attempt, reverse=True):
        counts_up_to[attempt] = least
        own = [_step(event) for event in by_attempt[attempt] if _resumes(event)]
        least = min(own if least is None else [*own, least], default=None)
    found: list[tuple[float, float, str, int]] = []
    for attempt in sorted(by_attempt):
        mine = by_attempt[attempt]
        begin, end = float(mine[0].get("since", mine[0]["time"])), max(float(event["time"]) for event in mine)
        begun = next((float(e["time"]) for e in mine if e["event"] in BEGINS), None)
        found.append((begin, end if begun is None else begun, "start_up", attempt))
        if begun is None:
            continue
        began = _first_step(history, mine, attempt, begun=begun, end=end)
        if began is None:
            began = begun if attempt != max(by_attempt) or any(event["event"] in _ENDS for event in mine) else end
        counts = counts_up_to[attempt]
        kept = end if counts is None else max(began, _kept(history, mine, attempt, counts, begun=began, end=end))
        found[-1] = (begin, began, "start_up", attempt)
        found += [(began, kept, "steps", attempt), (kept, end, "lost", attempt)]
    return found


def _first_step(history: History, events: Sequence[Event], attempt: int, *, begun: float, end: float) -> float | None:
    """When an attempt began its first step; None if it has not logged one."""
    lines = history.lines
    rows = np.flatnonzero(lines.attempt == attempt)
    timed = np.flatnonzero(np.isfinite(lines.columns["step_time_s"][rows])) if len(rows) else rows
    if not len(timed):
        return None
    own = [
        {"step": lines.step[row]}
        | {name: found[row] for name, found in lines.columns.items() if np.isfinite(found[row])}
        for row in rows[: timed[0] + 1]
    ]
    step = next((_step(event) for event in events if _resumes(event)), 0)
    return first_step_began(own, step=step, begun=begun, end=end)


def _kept(history: History, events: Sequence[Event], attempt: int, step: int, *, begun: float, end: float) -> float:
    """Until when an attempt's work counts, if the next one resumes after a step: its end if it saved that step last.

    The save of the step began when the step was done, which need not be a logged step.
    """
    if any(event["event"] in ORDERLY_ENDS and _step(event) <= step for event in events):
        return end
    saved = [float(e["time"]) for e in events if e["event"] == "save_begin" and _step(e) == step]
    return min(end, max([_reached(history, attempt, step, begun=begun, end=end), *saved]))


def _reached(history: History, attempt: int, step: int, *, begun: float, end: float) -> float:
    """When an attempt had done a step; the attempt's end if unknown."""
    lines, times = history.lines, history.lines.columns.get("time", np.zeros(0))
    known = (lines.attempt == attempt) & np.isfinite(times)
    if not known.any():
        return end
    kept: Floats = times[known & (lines.step <= step)]
    return min(end, float(kept.max())) if len(kept) else begun


def _timeline_events(events: Sequence[Event], history: History, *, begin: float) -> list[TimelineEvent]:
    found = [
        TimelineEvent(
            hours=(float(event["time"]) - begin) / 3600,
            attempt=_attempt(event),
            step=int(event["step"]) if isinstance(event.get("step"), int) else None,
            event=str(event["event"]),
            text=_text(event),
            routine=event["event"] in ROUTINE,
        )
        for event in events
        if event["event"] != "save_begin"  # only the commit is shown
    ]
    return sorted([*found, *_deaths(events, history, begin=begin)], key=lambda one: one.hours)


def _deaths(events: Sequence[Event], history: History, *, begin: float) -> list[TimelineEvent]:
    """Attempts that ended without an event although another attempt followed, because their processes were killed."""
    by_attempt: dict[int, list[Event]] = {}
    for event in events:
        by_attempt.setdefault(_attempt(event), []).append(event)
    found = []
    for attempt, mine in sorted(by_attempt.items())[:-1]:
        if any(event["event"] in _ENDS for event in mine):
            continue
        own = history.lines.attempt == attempt
        times = history.lines.columns.get("time", np.zeros(0))[own]
        last = max(float(mine[-1]["time"]), float(np.nanmax(times)) if np.isfinite(times).any() else 0.0)
        step = int(history.lines.step[own].max()) if own.any() else None
        text = "nothing more was written: the processes were killed, or the machine went down"
        found.append(TimelineEvent((last - begin) / 3600, attempt, step, "died", text, routine=False))
    return found


def _text(event: Event) -> str:
    hidden = (
        "time",
        "attempt",
        "event",
        "step",
        "since",
        "guessing",
        "attempt_id",
        "sources",
        "leaks",
        "prepared_with",
    )  # sources_section.py shows sources
    shown = {key: value for key, value in event.items() if key not in hidden and value is not None}
    return ", ".join(field_in_words(key, value) for key, value in shown.items())[:400]


def _attempt(event: Event) -> int:
    number = event.get("attempt", 0)
    return number if isinstance(number, int) else 0


def _step(event: Event) -> int:
    step = event.get("step", 0)
    return step if isinstance(step, int) else 0


def _resumes(event: Event) -> bool:
    return event["event"] in BEGINS
