"""Runs that are done: the line for the terminal, and the record in a run's events."""

from __future__ import annotations

from pathlib import Path

from mmscale.runs.events import BEGINS, read_events
from mmscale.runs.metrics import evaluation_cut_short


def describe_done(*, step: int, steps: int, raised: str) -> str:
    """That nothing is left to train, and how to train on.

    Args:
        step: steps done.
        steps: the last one.
        raised: name of the setting with the number of steps, which the user can raise.
    """
    return f"{step} of {steps} steps; nothing is left to train; raise {raised} to go on, e.g. {raised}={2 * steps}"


def has_finished(run: Path, step: int) -> bool:
    """Whether the last attempt that trained has recorded its end after a step, with all evaluations."""
    events = [event for event in read_events(run) if event["event"] in (*BEGINS, "finish")]
    ended = bool(events) and events[-1]["event"] == "finish" and events[-1].get("step") == step
    return ended and not evaluation_cut_short(run, step)
