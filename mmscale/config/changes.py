"""What changed between the configuration that wrote a checkpoint and the one that goes on from it.

The new configuration always wins; which changes are refused unless they are confirmed is said here, who asks is train's
business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmscale.config import document as documents
from mmscale.config.schema import Config

_AUTO = "model.experts.share"
# Settings after whose change the run optimizes something else, or reads its data in another order.
_OBJECTIVE = (
    "data.",
    "vocab.",
    "train.z_loss",
    "train.modality_weights",
    "train.global_batch_size",
    "model.experts.share",
    "model.experts.scope",
    "model.experts.capacity",
    "model.experts.choice",
    "model.depth.capacity",
    "model.depth.choice",
    "model.seq_length",
    "run.seed",
)
# What a checkpoint that does not know a setting was trained with, whatever the default is today.
_BEFORE = {"model.experts.choice": "sigmoid"}
_HARMLESS = ("data.workers", "data.cache")  # how batches are fetched, not which
_MISSING = object()


@dataclass(frozen=True)
class Change:
    """One setting that differs.

    Attributes:
        key: dotted key.
        old, new: its values as JSON; "(none)" where there was no such key.
        objective: whether the run would optimize something else with it.
    """

    key: str
    old: str
    new: str
    objective: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


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
        found.append(Change(key, _shown(one), _shown(other), _is_objective(key, new)))
    return found


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Single values by dotted key; an empty list or mapping is as good as none."""
    return {key: value for key, value in documents.leaves(dict(data)) if value not in ({}, [])}


def _is_objective(key: str, config: Config) -> bool:
    if key == "train.micro_batch_size":
        return config.model.experts.scope == "micro_batch" and config.model.kind != "dense"
    return key.startswith(_OBJECTIVE) and not key.startswith(_HARMLESS)


def _shown(value: Any) -> str:
    return "(none)" if value is _MISSING else json.dumps(value)


def describe(found: Sequence[Change], *, objective: bool) -> list[str]:
    """One line for each change of this kind."""
    return [str(change) for change in found if change.objective is objective]
