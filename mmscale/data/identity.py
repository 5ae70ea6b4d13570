"""Which data a run learns from, told by content and not by path: kept in its checkpoints, compared when it goes on.

Reads manifests, and tables of lengths only where a manifest does not say what the data was made from. No torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmscale.config import Config
from mmscale.data.manifest import Manifest, named_sources, read_table


class SourceIdentity(BaseModel):
    """One data set of a blend.

    Attributes:
        path: where it was found.
        weight: its weight as it was given.
        identity: equal for equal documents in an equal order, wherever they are.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    weight: float
    identity: str


def identities(config: Config, blend: Mapping[Path, Manifest], *, split: str = "train") -> list[SourceIdentity]:
    """The data sets of a configuration, in its order.

    Args:
        config: names them.
        blend: their manifests by folder, from `read_blend`.
        split: of which documents.
    """
    return [
        SourceIdentity(
            path=source.path,
            weight=source.weight,
            identity=identity_of(Path(source.path), blend[Path(source.path)], split=split),
        )
        for source in named_sources(config)
    ]


def identity_of(folder: Path, manifest: Manifest, *, split: str = "train") -> str:
    """A hash of a split's content.

    `data prepare` puts a digest of the documents and of what they were prepared with into the manifest. Data that was
    made by other programs is told by the lengths, modalities and loss masks of its documents instead.
    """
    parts = manifest.splits[split].parts if split in manifest.splits else ()
    listing: list[Any] = [split, manifest.vocabulary, manifest.source, [part.model_dump() for part in parts]]
    if not manifest.source:
        listing.append([zlib.crc32(read_table(folder, part).tobytes()) for part in parts if part.documents])
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]


def known(info: Mapping[str, Any]) -> list[SourceIdentity] | None:
    """The data that a checkpoint was trained on; None: it was written before this was kept."""
    saved = info.get("data")
    return None if saved is None else [SourceIdentity.model_validate(entry) for entry in saved]


def compare(old: Sequence[SourceIdentity], new: Sequence[SourceIdentity]) -> tuple[list[str], list[str]]:
    """What changed in the data: one line for each change that makes it other data, and one for each folder that moved.

    Args:
        old: the data of the checkpoint.
        new: the data that is going to be read.
    """
    pairs = match(old, new)
    renamed = [(old[i].path, new[j].path) for i, j in pairs if old[i].path != new[j].path]
    moved = [f"data: {before} -> {after}, the same documents" for before, after in renamed]
    gone = [one for number, one in enumerate(old) if number not in {i for i, _ in pairs}]
    added = [one for number, one in enumerate(new) if number not in {j for _, j in pairs}]
    replaced = {one.path for one in gone} & {one.path for one in added}
    lines = [f"data: {path} holds other documents" for path in sorted(replaced)]
    lines += [f"data: {one.path} is left out" for one in gone if one.path not in replaced]
    lines += [f"data: {one.path} is new" for one in added if one.path not in replaced]
    if [i for i, _ in pairs] != sorted(i for i, _ in pairs):
        lines.append(f"data: another order, now {', '.join(one.path for one in new)}")
    before, after = _shares(old), _shares(new)
    if not gone and not added:
        for i, j in pairs:
            if abs(before[i] - after[j]) > 1e-9:
                lines.append(f"data: share of {new[j].path}: {before[i]:.4g} -> {after[j]:.4g}")
    return lines, moved


def match(old: Sequence[SourceIdentity], new: Sequence[SourceIdentity]) -> list[tuple[int, int]]:
    """Places in `old` and `new` of the same documents, in the order of `new`; of equal ones those of one path."""
    left = dict(enumerate(old))
    found: dict[int, int] = {}
    for same_path in (True, False):
        for j, wanted in enumerate(new):
            if j in found:
                continue
            for i, one in left.items():
                if one.identity == wanted.identity and (one.path == wanted.path or not same_path):
                    found[j] = i
                    del left[i]
                    break
    return [(found[j], j) for j in sorted(found)]


def _shares(data: Sequence[SourceIdentity]) -> list[float]:
    total = sum(one.weight for one in data)
    return [one.weight / total for one in data]
