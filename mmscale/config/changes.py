"""What changed between the configuration that wrote a checkpoint and the one that goes on from it.

The new configuration always wins; which changes are refused, or have to be confirmed, follows from effects.py. Who asks
is train's business.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmscale.config import document as documents
from mmscale.config.effects import Effect, effect_of
from mmscale.config.schema import Config

_AUTO = "model.experts.share"
# What a checkpoint that does not know a setting was trained with, whatever the default is today.
_BEFORE = {"model.experts.choice": "sigmoid", "model.experts.capacity": "nominal"}
_MISSING = object()
# After these the run optimizes something else than before, or reads other data.
CONFIRMED = frozenset({Effect.FUNCTION, Effect.OBJECTIVE, Effect.DATA})


@dataclass(frozen=True)
class Change:
    """One setting that differs.

    Attributes:
        key: dotted key.
        old, new: its values as JSON; "(none)" where there was no such key.
        effect: what the setting decides.
    """

    key: str
    old: str
    new: str
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    @property
    def confirmed(self) -> bool:
        """Whether the user has to confirm it."""
        return self.effect in CONFIRMED


def changes(old: Mapping[str, Any], new: Config) -> list[Change]:
    """Settings that differ, in the order of the schema.

    Args:
        old: `Config.model_dump(mode="json")` of the configuration that wrote the checkpoint.
        new: this run's; an `auto` share that is not resolved yet is left out.
    """
    before, after = _settings(old), _settings(new.model_dump(mode="json"))
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        one, other = before.get(key, _BEFORE.get(key, _MISSING)), after.get(key, _MISSING)
        if one == other or (new.model.experts.share == "auto" and key.startswith(_AUTO)):
            continue
        found.append(Change(key, _shown(one), _shown(other), effect_of(key, new)))
    return found


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with the settings that were added since, as they were in effect when it was written.

    Args:
        saved: as for `changes`.
    """
    full: dict[str, Any] = copy.deepcopy(dict(saved))
    for key, value in _BEFORE.items():
        *parents, last = key.split(".")
        section = full
        for parent in parents:
            section = section.setdefault(parent, {})
        section.setdefault(last, value)
    return full


def function_changes(old: Mapping[str, Any], new: Config) -> list[str]:
    """One line for each setting whose change makes the same weights compute something else."""
    return [str(change) for change in changes(old, new) if change.effect is Effect.FUNCTION]


def describe(found: Sequence[Change], *, confirmed: bool) -> list[str]:
    """One line for each change that has to be confirmed, or for each other one."""
    return [str(change) for change in found if change.confirmed is confirmed]


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Single values by dotted key; an empty list or mapping is as good as none."""
    return {key: value for key, value in documents.leaves(dict(data)) if value not in ({}, [])}


def _shown(value: Any) -> str:
    return "(none)" if value is _MISSING else json.dumps(value)
