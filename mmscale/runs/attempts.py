"""Attempts of a run: their numbers, and the configuration of each."""

from __future__ import annotations

import re
from pathlib import Path

from mmscale.runs.events import read_events

LATEST_SETTINGS = "config.yaml"  # configuration of the latest attempt


def settings_name(attempt: int) -> str:
    """Name of the file in a run's folder with the configuration of an attempt."""
    return f"config.{attempt}.yaml"


def settings_file(run: Path, attempt: int | None) -> Path:
    """The configuration of an attempt. If it has no separate file, or is None, that of the latest attempt."""
    own = run / settings_name(attempt) if attempt is not None else None
    return own if own is not None and own.is_file() else run / LATEST_SETTINGS


def attempts_with_settings(run: Path) -> list[int]:
    """Numbers of the attempts whose configuration exists, in order."""
    names = [re.fullmatch(r"config\.(\d+)\.yaml", file.name) for file in run.glob("config.*.yaml")]
    return sorted(int(name[1]) for name in names if name)


def next_attempt(run: Path) -> int:
    """Number of the attempt that starts now: 1, or one above the numbers in events.jsonl and of config.N.yaml files."""
    known = [event["attempt"] for event in read_events(run) if isinstance(event.get("attempt"), int)]
    return max(known + attempts_with_settings(run), default=0) + 1
