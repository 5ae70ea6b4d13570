"""Data that weights were trained on before: by earlier attempts, or before their run or stage began. No torch.

Checkpoints have the first with the order of the data, and the second in their metadata. A stage has the weights of its
main run, and a run of `ckpt fuse` or `ckpt average` those of several runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.data.prepared.leaks import still_as_read
from mmscale.data.prepared.manifest import Manifest

LEARNED = "main_data"  # in the metadata of the stage, beside the step of the main checkpoint
MADE_FROM = "made_from"  # in the metadata of a run with weights of several ones; holds LEARNED too


def learned_from(info: Mapping[str, Any], stream: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """Paths and identities of the data sets that a checkpoint's run trains on, and that its weights were before it.

    Args:
        info: the checkpoint's metadata.
        stream: as in `read_before`.
    """
    own = [
        (one["path"], one["identity"])
        for one in info.get("data", ())
        if one["weight"] > 0 or any(weight > 0 for _, weight in one.get("later", ()))
    ]
    found: dict[str, str] = {}
    for path, identity in (*own, *read_before(stream), *recorded(info)):
        found.setdefault(identity, path)
    return [{"path": path, "identity": identity} for identity, path in found.items()]


def read_before(stream: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Paths and identities of the data sets of which documents were read before the blend last changed.

    Args:
        stream: settings of the order of the data, as checkpoints keep them (`mmscale.data.stream.segments`).
    """
    parts = (part for segment in stream[:-1] for part in segment["parts"])
    read = {part["identity"]: part["path"] for part in parts if part.get("taken") or part.get("more")}
    return [(path, identity) for identity, path in read.items()]


def carried(info: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a run that trains a checkpoint further: what its weights were trained on before its own run or stage.

    Args:
        info: the checkpoint's metadata, or that of a stage's folder.

    Returns:
        Empty if nothing is recorded.
    """
    found = {identity: path for path, identity in recorded(info)}
    before = [{"path": path, "identity": identity} for identity, path in found.items()]
    return {MADE_FROM: {LEARNED: before}} if before else {}


def made_from(*infos: Mapping[str, Any], newest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata of a run with weights of several checkpoints: what they were trained on.

    Args:
        infos: metadata of the checkpoints.
        newest: the metadata that it is added to, whose data need not be repeated; None: of a run without data.

    Returns:
        Empty if nothing is to be added.
    """
    known = {one["identity"] for one in learned_from(newest or {})}
    found = {one["identity"]: one for info in infos for one in learned_from(info) if one["identity"] not in known}
    if not found:
        return {}
    before = carried(newest or {}).get(MADE_FROM, {LEARNED: []})
    return {MADE_FROM: {LEARNED: [*before[LEARNED], *found.values()]}}


def learned_sets(origin: Mapping[str, Any], own: Mapping[Path, Manifest]) -> tuple[dict[Path, Manifest], list[str]]:
    """Manifests of these sets by folder, and a line for each one that cannot be compared, as `still_as_read`.

    Args:
        origin: as for `recorded`.
        own: manifests of the data sets that the stage evaluates and trains on, by folder.
    """
    return still_as_read(((path, (identity,)) for path, identity in recorded(origin)), own)


def recorded(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Paths and identities of the data sets that weights were trained on before their run or stage began.

    Args:
        origin: `BuiltStage.origin`, or the metadata of a checkpoint, which contains it.
    """
    for stage in origin.values():
        for one in stage.get(LEARNED, ()) if isinstance(stage, Mapping) else ():
            yield one["path"], one["identity"]
