"""Numbers as a person writes them: 3e-4, 2e9, 4_096, 64k, 1h.

PyYAML reads `3e-4` as a string (YAML 1.1 wants a dot), so numeric settings go through these.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"^[+-]?(\d[\d_]*)?(\.\d*)?([eE][+-]?\d+)?$")
_SUFFIX = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def parse_number(value: Any) -> Any:
    """A float for strings such as "3e-4" or "64k"; anything else is returned as it is, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    scale = 1.0
    if text[-1:] in _SUFFIX:
        text, scale = text[:-1], _SUFFIX[text[-1]]
    if text and any(ch.isdigit() for ch in text) and _NUMBER.match(text):
        return float(text.replace("_", "")) * scale
    return value


def parse_integer(value: Any) -> Any:
    """An int for whole numbers such as "2e9"; anything else is returned as it is, for pydantic to judge."""
    number = parse_number(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number


def parse_seconds(value: Any) -> Any:
    """Seconds for durations such as "90s", "30m", "1h"; plain numbers are seconds already."""
    if isinstance(value, str):
        match = re.match(r"^\s*([\d.]+)\s*([a-z]+)\s*$", value)
        if match and match.group(2) in _SECONDS:
            return float(match.group(1)) * _SECONDS[match.group(2)]
    return parse_number(value)
