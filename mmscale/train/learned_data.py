"""The data that the main run has trained the weights of a stage on, as the stage's checkpoints record it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale.data.prepared.leaks import still_as_read
from mmscale.data.prepared.manifest import Manifest

LEARNED = "main_data"  # in the metadata of the stage, beside the step of the main checkpoint


def learned_from(info: Mapping[str, Any]) -> list[dict[str, str]]:
    """Paths and identities of the data sets that a checkpoint's run trains on.

    Args:
        info: the checkpoint's metadata.
    """
    return [
        {"path": one["path"], "identity": one["identity"]}
        for one in info.get("data", ())
        if one["weight"] > 0 or any(weight > 0 for _, weight in one.get("later", ()))
    ]


def learned_sets(origin: Mapping[str, Any], own: Mapping[Path, Manifest]) -> tuple[dict[Path, Manifest], list[str]]:
    """Manifests of these sets by folder, and a line for each one that cannot be compared, as `still_as_read`.

    Args:
        origin: `BuiltStage.origin`.
        own: manifests of the data sets that the stage evaluates and trains on, by folder.
    """
    return still_as_read(((path, (identity,)) for path, identity in _recorded(origin)), own)


def _recorded(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for stage in origin.values():
        for one in stage.get(LEARNED, ()) if isinstance(stage, Mapping) else ():
            yield one["path"], one["identity"]
