"""Whether two checkpoints hold one model, by their metadata. No torch; average.py compares the tensors too."""

from __future__ import annotations

from mmscale.checkpoint.named import Described
from mmscale.checkpoint.settings import config_of
from mmscale.config.changes import function_changes
from mmscale.errors import CheckpointError


def check_models(one: Described, other: Described, *, remedy: str) -> None:
    """Refuse two checkpoints of different models.

    Args:
        one: a checkpoint or an archive.
        other: another one.
        remedy: of the error.

    Raises:
        CheckpointError: vocabularies or settings of the model differ.
    """
    mine, theirs = one.info().get("shape", {}), other.info().get("shape", {})
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if keys:
        said = "; ".join(f"{key} is {mine.get(key)} and {theirs.get(key)}" for key in keys)
        raise CheckpointError(f"{one.path} and {other.path} hold different models: {said}", remedy=remedy)
    saved = one.info().get("config"), other.info().get("config")
    if all(saved) and (found := function_changes(saved[0] or {}, config_of(other.info(), where=other.path))):
        raise CheckpointError(
            f"{one.path} and {other.path} compute different functions of their weights: {'; '.join(found)}",
            remedy=remedy,
        )
