"""Display names for the names in a run's files, for output that people read."""

from __future__ import annotations

from typing import Any

# Parts of a run's time (launch/goodput.py).
TIME_PARTS = {
    "start_up": "start-up",
    "steps": "steps that count",
    "save_stall": "save stalls",
    "evaluation": "evaluation",
    "lost": "lost and repeated",
    "other": "other",
    "waiting": "waiting between attempts",
}
_SECONDS = "_s"


def in_words(name: str) -> str:
    """The words of a name: `save_committed` is "save committed"."""
    return name.replace("_", " ")


def field_in_words(name: str, value: Any) -> str:
    """A field of an event: `blocked_s`, 0.3289 is "blocked 0.3289 s"."""
    if name.endswith(_SECONDS) and isinstance(value, int | float):
        return f"{in_words(name.removesuffix(_SECONDS))} {value} s"
    return f"{in_words(name)} {value}"
