"""The x axes of a run's figures: steps, tokens, model FLOPs, and hours since its first event.

An axis is all NaN if the run has no data for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.errors import MmscaleError
from mmscale.report.history import Floats, History
from mmscale.runs.attempts import settings_file
from mmscale.runs.events import BEGINS

_TIMES = ("time", "since")  # of an event, and of the process or job that wrote it
# Pauses are not included in step_time_s; they are added if the lines have no time stamps.
_PAUSES = ("save_stall_s", "eval_s", "parameter_hash_s", "rollback_s", "profile_s")


def axes_of(run: Path, history: History, *, clock: Floats, begin: float) -> dict[str, Floats]:
    """Values of every axis at the rows of a history, [R] each.

    Args:
        run: its folder; FLOPs per token are computed from its configuration if metrics.jsonl has none.
        history: its metrics.
        clock: from `clock_of`.
        begin: from `first_time` [seconds since 1970].
    """
    tokens = history.of("tokens")
    flops = history.of("flops")
    if len(history) and np.isnan(flops).all() and not np.isnan(tokens).all():
        flops = tokens * _flops_per_token(settings_file(run, history.attempt))
    return {"step": history.steps, "tokens": tokens, "flops": flops, "hours": (clock - begin) / 3600.0}


def first_time(events: Sequence[Mapping[str, Any]], *, clock: Floats) -> float:
    """Start of a run [seconds since 1970]: of its first process or event, or its first step; NaN if unknown."""
    times = [float(event[key]) for event in events for key in _TIMES if isinstance(event.get(key), int | float)]
    known = clock[np.isfinite(clock)]
    return min([*times, *([float(known.min())] if len(known) else [])], default=float("nan"))


def clock_of(history: History, events: Sequence[Mapping[str, Any]]) -> Floats:
    """Time at which each row was logged [seconds since 1970]; summed from step times if lines have no time."""
    clock = history.of("time").copy()
    if not len(history) or not np.isnan(clock).all():
        return clock
    attempts = history.of("attempt")
    for attempt in np.unique(attempts):
        begun = next(
            (e for e in events if e.get("attempt") == attempt and e.get("event") in BEGINS and "time" in e),
            None,
        )
        if begun is None:
            continue
        rows = np.flatnonzero(attempts == attempt)
        done = np.diff(history.steps[rows], prepend=float(begun.get("step", 0)))
        seconds = _known(history, "step_time_s", rows) * done
        for name in _PAUSES:
            seconds += _known(history, name, rows)
        clock[rows] = float(begun["time"]) + np.cumsum(seconds)
    return clock


def _known(history: History, key: str, rows: np.ndarray) -> Floats:
    values = history.of(key)[rows]
    return np.where(np.isfinite(values), values, 0.0)


def _flops_per_token(config: Path) -> float:
    """Model FLOPs per trained token for this configuration; NaN if it cannot be read."""
    from mmscale.config.load import load
    from mmscale.plan import flops_per_token

    try:
        return float(flops_per_token(load(config, recorded=True)).training)
    except (MmscaleError, OSError, ValueError):
        return float("nan")
