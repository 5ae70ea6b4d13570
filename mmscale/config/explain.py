"""Describes one setting, for `mmscale config explain KEY`.

All texts come from the schema. This module prints nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mmscale.config import keys
from mmscale.config.keys import ANY, Key
from mmscale.errors import UsageError


def explain(key: str = "") -> dict[str, Any]:
    """Describe a setting or a section.

    Args:
        key: dotted key; list entries may be written with their index, names of a mapping as they are; "": everything.

    Returns:
        `key`, `meaning` and `default`; for a section `keys`, the dotted keys in it, and for a setting `type`, `unit`,
        `required`, `allowed` (a list where only certain values are, else None) and `source`.

    Raises:
        UsageError: there is no such key.
    """
    if not key:
        return {"key": "", "meaning": "All settings.", "keys": [name for name in keys.all_keys() if ANY not in name]}
    found = keys.find(key)
    if found is None:
        meant = keys.did_you_mean(key)
        remedy = f"did you mean `{meant}`?" if meant else "`mmscale config explain` without a key lists all of them"
        raise UsageError(f"{key} is not a setting", remedy=remedy)
    entry: dict[str, Any] = {"key": key, "meaning": found.field.description or ""}
    inside = [name for name in keys.all_keys() if name.startswith(f"{found.name}.")]
    if found.section is not None:
        entry["keys"] = inside
        entry["default"] = _default(found)
        return entry
    entry |= {
        "type": keys.describe(found.annotation),
        "unit": found.unit,
        "required": found.field.is_required(),
        "default": _default(found),
        "allowed": keys.allowed_values(found.annotation),
        "source": found.source,
    }
    return entry | ({"keys": inside} if inside else {})


def _default(key: Key) -> Any:
    default = key.field.default
    if default is PydanticUndefined:
        return None
    if isinstance(default, tuple):
        return [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in default]
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default
