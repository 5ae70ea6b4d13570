"""Parses numbers and durations such as 3e-4, 2e9, 4_096, 010, 64k, 1h and 12:30:00.

The YAML reader leaves everything that is not a number of YAML 1.2 as text, so numeric settings use these parsers.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"^[+-]?(\d[\d_]*)?(\.\d*)?([eE][+-]?\d+)?$")
_LONGEST = 100  # characters
_SUFFIX = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def parse_number(value: Any) -> Any:
    """A float for strings such as "3e-4" or "64k"; other values are returned unchanged for pydantic to check.

    Raises:
        ValueError: it is true or false, which Python counts as numbers.
    """
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")  # Python's bool is an int
    if not isinstance(value, str) or len(value) > _LONGEST:
        return value
    text = value.strip()
    scale = 1.0
    if text[-1:] in _SUFFIX:
        text, scale = text[:-1], _SUFFIX[text[-1]]
    if text and any(ch.isdigit() for ch in text) and _NUMBER.match(text):
        return float(text.replace("_", "")) * scale
    return value


def parse_integer(value: Any) -> Any:
    """An int for whole numbers such as "2e9"; other values are returned unchanged for pydantic to check."""
    number = parse_number(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number


def parse_seconds(value: Any) -> Any:
    """Seconds for durations such as "90s", "30m", "1h" and "1:30:00"; plain numbers are seconds already."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", value)
        if match and match.group(2) in _SECONDS:
            return float(match.group(1)) * _SECONDS[match.group(2)]
        clock = re.fullmatch(r"\s*(\d{1,6}):([0-5]\d):([0-5]\d)\s*", value)
        if clock:
            hours, minutes, seconds = map(float, clock.groups())
            return hours * 3600 + minutes * 60 + seconds
    return parse_number(value)
