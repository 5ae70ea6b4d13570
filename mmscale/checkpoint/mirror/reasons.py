"""Reasons of failures, in a form that may be shown and recorded."""

from __future__ import annotations

import os

_LONGEST_REASON = 300
_SECRET_NAMES = ("SECRET", "TOKEN", "PASSWORD", "KEY", "CREDENTIAL")


def without_secrets(text: str) -> str:
    """The first line of a message, without values of variables that look like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 4 and any(part in name.upper() for part in _SECRET_NAMES):
            text = text.replace(value, "***")
    return (text.splitlines() or [""])[0][:_LONGEST_REASON]
