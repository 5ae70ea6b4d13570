# budget.json of a launch folder: how many restarts a launch has had. What counts, and what follows, is policy.py's.
"""A launch's restarts on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from launch.policy import Budget
from mmscale import bounded

_BUDGET = "budget.json"


def load(folder: Path) -> Budget | None:
    """The budget of a launch; None if nothing was written down."""
    try:
        return bounded.read_record(Budget, folder / _BUDGET)
    except (OSError, ValueError):
        return None


def file_of(folder: Path, budget: Budget) -> tuple[Path, bytes]:
    """The file that holds the budget of a launch, and its content."""
    return folder / _BUDGET, json.dumps(asdict(budget)).encode()
