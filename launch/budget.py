# budget.json of a launch folder: how many restarts a launch has had. What counts, and what follows, is policy.py's.
"""A launch's restarts on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from launch.policy import Budget

_BUDGET = "budget.json"


def load(folder: Path) -> Budget | None:
    """The budget of a launch; None if nothing was written down."""
    try:
        return Budget(**json.loads((folder / _BUDGET).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep(folder: Path, budget: Budget) -> None:
    """Write it down, whole or not at all."""
    temporary = folder / f".{_BUDGET}"
    temporary.write_text(json.dumps(asdict(budget)))
    temporary.replace(folder / _BUDGET)
