"""Compares the configuration that wrote a checkpoint with the one that resumes from it.

The new configuration takes precedence. effects.py determines which changes are refused or need a confirmation;
mmscale.train asks the user.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from mmscale.config import document as documents
from mmscale.config import keys
from mmscale.config.data.schema import FORMER_PREPARE
from mmscale.config.effects import Effect, effect_of
from mmscale.config.schema import Config

_AUTO = "model.experts.share"
_DATA_SEED, _SEED = "data.seed", "run.seed"
# Values that applied to older checkpoints, before these settings existed; independent of today's defaults.
_BEFORE = {
    "model.experts.choice": "sigmoid",
    "model.experts.capacity": "nominal",
    "model.experts.token_choice": None,
    "data.seed": None,
    "data.order": "epochs",
    "data.retrieval.neighbours": 0,
    "data.retrieval.loss": True,
    "objective.cm3_rate": 0.0,
    "objective.image_spans": "whole",
    "model.rope_scaling.beta_fast": 32.0,
    "model.rope_scaling.beta_slow": 1.0,
    "model.rope_scaling.attention_factor": None,
    "model.rope_scaling.truncate": True,
}
_MISSING = object()
_SPANS = "objective.image_spans"
WITHOUT_MASKING = ", without effect while objective.cm3_rate is 0"
_LONGEST = 300  # characters of a section in a line
# A change with one of these effects changes what the run optimizes or which data it reads.
CONFIRMED = frozenset({Effect.FUNCTION, Effect.OBJECTIVE, Effect.DATA})


@dataclass(frozen=True)
class Change:
    """One setting that differs.

    Attributes:
        key: dotted key.
        old, new: its values as JSON; "(none)" if there was no such key.
        effect: what the setting affects.
        remark: follows the values when it is printed, e.g. why the setting has no effect.
    """

    key: str
    old: str
    new: str
    effect: Effect
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}{self.remark}"

    @property
    def confirmed(self) -> bool:
        """Whether the user has to confirm it."""
        return self.effect in CONFIRMED


def changes(old: Mapping[str, Any], new: Config) -> list[Change]:
    """Settings that differ, in the order of the schema.

    A setting that did not exist when the checkpoint was written, and has its default, differs only if it has to be
    confirmed.

    Args:
        old: `Config.model_dump(mode="json")` of the configuration that wrote the checkpoint.
        new: this run's; an `auto` share that is not resolved yet is ignored.
    """
    now = new.model_dump(mode="json")
    before, after = {key: value for key, value in _settings(old).items() if not _is_former(key)}, _settings(now)
    found = []
    sections = {key for key, value in before.items() if value is None and _has_inside(key, after)}
    sections |= {key for key, value in after.items() if value is None and _has_inside(key, before)}
    for key in [*after, *(key for key in before if key not in after)]:
        one, other = before.get(key, _BEFORE.get(key, _MISSING)), after.get(key, _MISSING)
        unresolved = new.model.experts.share == "auto" and key.startswith(_AUTO)
        if one == other or unresolved or (key == _DATA_SEED and _data_seed(before) == _data_seed(after)):
            continue
        if _is_inside(key, sections):
            continue
        remark = WITHOUT_MASKING if key == _SPANS and not new.objective.cm3_rate else ""
        change = Change(key, _shown(one), _shown(other), effect_of(key, new), remark)
        if key in sections:
            change = _of_section(key, old, now, new)
        if change.confirmed or one is not _MISSING or not _is_new_default(key, old, now):
            found.append(change)
    return found


def _has_inside(key: str, settings: Mapping[str, Any]) -> bool:
    return any(one.startswith(f"{key}.") for one in settings)


def _is_inside(key: str, sections: Collection[str]) -> bool:
    return any(key.startswith(f"{one}.") for one in sections)


def _of_section(key: str, old: Mapping[str, Any], now: Mapping[str, Any], new: Config) -> Change:
    """The change of a section that was null, or is null now, with its own effect or else that of its settings."""
    one, other = _value_at(old, key), _value_at(now, key)
    inside = [f"{key}.{name}" for name, _ in documents.leaves(one if other is None else other)]
    effects = (effect_of(name, new) for name in (key, *inside))
    effect = next((one for one in effects if one is not Effect.FREE), Effect.FREE)
    return Change(key, _shown(one)[:_LONGEST], _shown(other)[:_LONGEST], effect)


def _value_at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration, with later settings added at the values that were in effect when it was written.

    Args:
        saved: as for `changes`.
    """
    full: dict[str, Any] = copy.deepcopy(dict(saved))
    for key, value in _BEFORE.items():
        *parents, last = key.split(".")
        section: Any = full
        for parent in parents:
            section = None if section is None else section.setdefault(parent, {})
        if section is not None:  # null: an optional section that the configuration does not have
            section.setdefault(last, value)
    return full


def function_changes(old: Mapping[str, Any], new: Config) -> list[str]:
    """One line for each changed setting that makes the same weights compute a different function."""
    return [str(change) for change in changes(old, new) if change.effect is Effect.FUNCTION]


def describe(found: Sequence[Change], *, confirmed: bool) -> list[str]:
    """One line for each change that needs a confirmation, or for each that does not."""
    return [str(change) for change in found if change.confirmed is confirmed]


def _is_former(key: str) -> bool:
    *section, name = key.split(".")[:3]
    return section == ["data", "prepare"] and name in FORMER_PREPARE


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Single values by dotted key; empty lists and mappings count as missing."""
    return {key: value for key, value in documents.leaves(dict(data)) if value not in ({}, [])}


def _is_new_default(key: str, old: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting, or a section around it, did not exist in an old configuration and now has its default.

    A section that was null existed: it was switched off.
    """
    parts = key.split(".")
    inside: Any = old
    for count, part in enumerate(parts, start=1):
        if not isinstance(inside, Mapping) or part not in now:  # a name with dots in it, of a mapping
            return False
        now = now[part]
        if part not in inside:
            setting = keys.find(".".join(parts[:count]))
            return setting is not None and _plain(setting.field.get_default(call_default_factory=True)) == now
        inside = inside[part]
    return False


def _plain(value: Any) -> Any:
    """A default as a checkpoint stores it."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else to_jsonable_python(value)


def _data_seed(settings: Mapping[str, Any]) -> Any:
    """The seed of the data's order; `data.seed` may be null, or missing in an old checkpoint."""
    own = settings.get(_DATA_SEED)
    return settings.get(_SEED) if own is None else own


def _shown(value: Any) -> str:
    return "(none)" if value is _MISSING else json.dumps(value)
