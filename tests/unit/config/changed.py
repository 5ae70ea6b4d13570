"""A configuration that differs from a base in a few keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmscale.config import Config


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """The base with keys replaced; the dots of a key are written as double underscores."""
    values = copy.deepcopy(dict(base))
    for key, value in changes.items():
        *parents, last = key.split("__")
        here = values
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = copy.deepcopy(value)
    return Config.model_validate(values)
