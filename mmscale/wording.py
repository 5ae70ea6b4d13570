"""Numbers with nouns that fit them, and durations in short form. Imports nothing of mmscale."""

from __future__ import annotations

import math


def numbered(number: float, one: str, many: str = "") -> str:
    """A number with its noun: `1 batch`, `1,200 batches`.

    Args:
        number: of the things.
        one: the noun for one of them.
        many: the noun for several; default: with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def duration(seconds: float) -> str:
    """Seconds in short form: 8s, 3m10s, 5h02m, 2d03h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"
