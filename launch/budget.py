"""Stores the restart budget of a launch.

budget.json of a launch folder: the number of restarts of a launch. policy.py defines what counts and what follows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from launch.policy import Budget
from mmscale import bounded

_BUDGET = "budget.json"


def load(folder: Path) -> Budget | None:
    """The budget of a launch; None if none was stored."""
    try:
        return bounded.read_record(Budget, folder / _BUDGET)
    except (OSError, ValueError):
        return None


def file_of(folder: Path, budget: Budget) -> tuple[Path, bytes]:
    """The file for the budget of a launch, and its content."""
    return folder / _BUDGET, json.dumps(asdict(budget)).encode()
