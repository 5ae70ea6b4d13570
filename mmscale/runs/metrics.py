"""Reads metrics.jsonl: one record per step. train/log/metrics_log.py writes it.

A step that is repeated after a resume occurs again, with a higher "attempt"; one that is repeated after a roll-back
within an attempt, with a higher "rollback" (omitted while it is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.runs.events import CUT_SHORT, read_events
from mmscale.runs.held_out import EVAL
from mmscale.runs.json_lines import from_json, read_lines

METRICS = "metrics.jsonl"
LAYERS = "layers.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """One record per step, in the order of steps. Of repeated steps the last one counts.

    A line with only held-out values (`eval/...`) is added to its step instead of replacing it.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(run_dir / METRICS):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        record = {key: from_json(value) for key, value in line.items()}
        known = steps.get(step)
        if known is None:
            steps[step] = record
            continue
        newer, older = _time(record), _time(known)
        if newer > older and not _held_out_only(record):
            steps[step] = record
        elif newer >= older:  # a line of an older attempt here was written by a process that should have ended
            known.update(record)
    return [steps[number] for number in sorted(steps)]


def evaluation_cut_short(run_dir: Path, step: int) -> bool:
    """Whether a stop request interrupted the evaluation after a step, and it was not repeated since."""
    if not any(event["event"] == CUT_SHORT and event.get("step") == step for event in read_events(run_dir)):
        return False
    return not any(line.get("step") == step and _held_out_only(line) for line in read_lines(run_dir / METRICS))


def _time(record: Mapping[str, Any]) -> tuple[int, int]:
    """Identifies the repetition of a step: attempt and roll-back."""
    return record.get("attempt", 0), record.get("rollback", 0)


def _held_out_only(record: Mapping[str, Any]) -> bool:
    return all(key.startswith(EVAL) for key in record if key not in ("step", "attempt", "rollback"))
