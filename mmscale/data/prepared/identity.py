"""The identity of a run's data by content, independent of paths: stored in checkpoints, compared when a run resumes.

It is computed from manifests, and from tables of lengths only if a manifest does not record the origin of the data. No
torch.
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
from mmscale.config.derived import blend_phases
from mmscale.data.prepared.manifest import TRAIN, Manifest, named_sources, read_table
from mmscale.data.prepared.neighbours import table_of
from mmscale.data.prepared.selection import SelectionFile, read_selection


class SourceIdentity(BaseModel):
    """One data set of a blend.

    Attributes:
        path: its folder when it was read.
        weight: its weight at the beginning of the run.
        later: steps at which its weight changes, with the new weights.
        identity: equal for equal documents in the same order, wherever they are.
        selection: names the weights of documents that training applies; empty: none.
        retrieval: names the neighbours that training reads documents with, as `retrieval_of`; empty: none.
        max_epochs: passes after which it is not read any more; None: no limit.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    weight: float
    identity: str
    selection: str = ""
    retrieval: str = ""
    later: tuple[tuple[int, float], ...] = ()
    max_epochs: int | None = None


def identities(config: Config, blend: Mapping[Path, Manifest], *, split: str = "train") -> list[SourceIdentity]:
    """The data sets of a configuration, in its order.

    Args:
        config: names them.
        blend: their manifests by folder, from `read_blend`.
        split: of which documents.
    """
    phases = blend_phases(config)
    return [
        SourceIdentity(
            path=source.path,
            weight=phases[0][1][number],
            max_epochs=source.max_epochs,
            later=tuple((step, weights[number]) for step, weights in phases[1:]),
            identity=identity_of(Path(source.path), blend[Path(source.path)], split=split),
            selection=selection_of(config, Path(source.path), blend[Path(source.path)]) if split == TRAIN else "",
            retrieval=retrieval_of(config, Path(source.path), blend[Path(source.path)]) if split == TRAIN else "",
        )
        for number, source in enumerate(named_sources(config))
    ]


def identity_of(folder: Path, manifest: Manifest, *, split: str = "train") -> str:
    """A hash of a split's content.

    `data prepare` writes a digest of the documents and of the settings into the manifest. Data that was made by other
    programs is identified by the lengths, modalities and loss masks of its documents instead.
    """
    parts = manifest.splits[split].parts if split in manifest.splits else ()
    listing: list[Any] = [split, manifest.vocabulary, manifest.source, [part.listing for part in parts]]
    if manifest.content:
        listing.append(manifest.content)
    if not manifest.source:
        listing.append([zlib.crc32(read_table(folder, part).tobytes()) for part in parts if part.documents])
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]


def selected(config: Config, folder: Path, manifest: Manifest) -> SelectionFile | None:
    """The weights of training documents that a run applies; None: it reads each document once per epoch.

    Raises:
        DataError: they are damaged, or were made for other documents.
    """
    if config.data.selection == "ignore":
        return None
    found = read_selection(folder)
    return None if found is None else read_selection(folder, of=identity_of(folder, manifest))


def selection_of(config: Config, folder: Path, manifest: Manifest) -> str:
    """The identity of these weights; empty: none."""
    found = selected(config, folder, manifest)
    return "" if found is None else found.identity


def retrieval_of(config: Config, folder: Path, manifest: Manifest) -> str:
    """How a run reads training documents with neighbours: how many at most, and the key of their table; empty: not.

    Raises:
        DataError: there are no neighbours, or they are damaged or were made for other documents.
    """
    most = config.data.retrieval.neighbours
    if not most:
        return ""
    return f"{most}-{table_of(folder, TRAIN, of=identity_of(folder, manifest)).key}"


def known(info: Mapping[str, Any]) -> list[SourceIdentity] | None:
    """The data that a checkpoint was trained on; None: the checkpoint does not contain it (older versions)."""
    saved = info.get("data")
    return None if saved is None else [SourceIdentity.model_validate(entry) for entry in saved]


def compare(old: Sequence[SourceIdentity], new: Sequence[SourceIdentity]) -> tuple[list[str], list[str]]:
    """What changed in the data: one line for each change of its content, and one for each folder that moved.

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
    for i, j in pairs:
        before, after = old[i].selection, new[j].selection
        if before != after:
            lines.append(f"data: weights of the documents of {new[j].path}: {before or 'none'} -> {after or 'none'}")
        before, after = old[i].retrieval, new[j].retrieval
        if before != after:
            lines.append(f"data: neighbours of the documents of {new[j].path}: {before or 'none'} -> {after or 'none'}")
        limits = [one.max_epochs or "no limit" for one in (old[i], new[j])]
        if limits[0] != limits[1]:
            lines.append(f"data: max_epochs of {new[j].path}: {limits[0]} -> {limits[1]}")
    if [i for i, _ in pairs] != sorted(i for i, _ in pairs):
        lines.append(f"data: another order, now {', '.join(one.path for one in new)}")
    shares, now = _shares(old), _shares(new)
    if not gone and not added:
        for i, j in pairs:
            if abs(shares[i] - now[j]) > 1e-9:
                lines.append(f"data: share of {new[j].path}: {shares[i]:.4g} -> {now[j]:.4g}")
            elif old[i].later != new[j].later:
                lines.append(f"data: later weights of {new[j].path}: {_steps(old[i])} -> {_steps(new[j])}")
    return lines, moved


def same_documents(old: Sequence[SourceIdentity], new: Sequence[SourceIdentity]) -> bool:
    """Whether two blends have the same documents in the same shares, so that held-out losses on them are comparable."""
    pairs, before, after = match(old, new), _shares(old), _shares(new)
    return len(pairs) == len(old) == len(new) and all(abs(before[i] - after[j]) < 1e-9 for i, j in pairs)


def match(old: Sequence[SourceIdentity], new: Sequence[SourceIdentity]) -> list[tuple[int, int]]:
    """Pairs of places in `old` and `new` with the same documents, in the order of `new`; prefers equal paths."""
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


def _steps(one: SourceIdentity) -> str:
    return ", ".join(f"{weight:.4g} from step {step}" for step, weight in one.later) or "none"


def _shares(data: Sequence[SourceIdentity]) -> list[float]:
    total = sum(one.weight for one in data)
    return [one.weight / total for one in data]
