"""What the splits of a data set have in common and what training repeats: computed once, and kept beside the data.

The keys of items and texts are kept too, so that data sets can be compared with one another when a run starts.
shared_content.py compares; `data prepare` calls this, `data inspect` and the start of a run read the result.
"""

from __future__ import annotations

import io
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.data.arrays import parse_array
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.group_splits import SUFFIX as GROUPS
from mmscale.data.prepared.group_splits import GroupSplits, group_splits
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import Manifest
from mmscale.data.prepared.parts import DONE
from mmscale.data.prepared.repeated_ids import SUFFIX, repeated_ids
from mmscale.data.prepared.shared_content import Repeated, Shared, common_content, repeated_content
from mmscale.data.prepared.split_keys import ContentKeys, Keys, SplitKeys, comparable, keys_of
from mmscale.runtime.atomic_files import write_atomic

log = logging.getLogger(__name__)

_FILE = ".cache/content.json"  # inside the data set
_KEYS = ".cache/keys.npy"  # uint64 [keys]; content.json says which are whose; those of each are sorted
_MOST_KEYS = 1 << 20  # of each modality of a split that are kept: 8 MiB
_MOST_BYTES = 1 << 30  # largest file of keys that is read
_SPLITS = (TRAIN, VALIDATION)

SetKeys = Mapping[str, ContentKeys]  # by split


@dataclass(frozen=True)
class ContentFacts:
    """What the splits have in common, what training repeats, and groups in both splits (None: unknown)."""

    shared: Shared
    repeated: Repeated
    groups: GroupSplits | None = None

    def leaks(self, *, of: str = "") -> list[str]:
        """Lines about what is trained on and held out; `of` is the data set."""
        return [*self.shared.lines(of=of), *(self.groups or GroupSplits()).lines(of=of)]

    def notes(self) -> list[str]:
        """Notes for the user."""
        return [*(f"note: {line}" for line in self.leaks()), *self.repeated.notes()]


def content_facts(folder: Path, manifest: Manifest) -> ContentFacts | None:
    """The facts, kept or computed; None: the documents cannot be compared, because they are of a Megatron corpus."""
    if not comparable(manifest):
        return None
    found = kept_facts(folder, manifest)
    if found is None or kept_keys(folder, manifest) is None:
        keys = {split: keys_of(folder, manifest, split) for split in _SPLITS}
        found = _computed(folder, manifest, keys)
        _keep(folder, manifest, found, keys)
    return found


def content_keys(folder: Path, manifest: Manifest) -> SetKeys | None:
    """The keys of both splits, kept or computed; None as in `content_facts`."""
    if content_facts(folder, manifest) is None:
        return None
    kept = kept_keys(folder, manifest)
    return {split: keys_of(folder, manifest, split) for split in _SPLITS} if kept is None else kept


def kept_facts(folder: Path, manifest: Manifest) -> ContentFacts | None:
    """The facts if they were computed for these documents before."""
    try:
        content = _content(folder, manifest)
        if content is None:
            return None
        groups = None if content["groups"] is None else _groups(content["groups"])
        return ContentFacts(shared_from(content["shared"]), _repeated(content["repeated"]), groups)
    except (OSError, *bounded.BAD_CONTENT):
        return None


def kept_keys(folder: Path, manifest: Manifest) -> SetKeys | None:
    """The keys if they were computed for these documents before; of a large split only of its first documents."""
    try:
        content = _content(folder, manifest)
        if content is None:
            return None
        data = bounded.read_bytes(folder / _KEYS, most=_MOST_BYTES)
        if zlib.crc32(data) != content["keys"]["crc32"]:
            return None
        counts, keys = content["keys"]["counts"], parse_array(data)
        if keys.dtype != np.uint64 or keys.shape != (sum(number for *_, number in counts),):
            return None
        return _by_split(counts, keys)
    except (OSError, *bounded.BAD_CONTENT):
        return None


def _content(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    content = bounded.read_object(folder / _FILE)
    return content if content["of"] == _identity(folder, manifest) else None


def _by_split(counts: Any, keys: Keys) -> SetKeys:
    items: dict[str, dict[str, Keys]] = {split: {} for split in _SPLITS}
    texts: dict[str, Keys] = {}
    start = 0
    for split, name, number in counts:
        own = keys[start : start + number]
        if name is None:
            texts[split] = own
        else:
            items[split][str(name)] = own
        start += number
    return {split: ContentKeys(items[split], texts[split]) for split in _SPLITS}


def _computed(folder: Path, manifest: Manifest, keys: Mapping[str, SplitKeys]) -> ContentFacts:
    names = {Path(part.prefix).name for split in manifest.splits.values() for part in split.parts}
    documents = sum(split.documents for split in manifest.splits.values())
    done = [folder / DONE / name for name in sorted(names)]
    ids = repeated_ids([file.with_name(f"{file.name}{SUFFIX}") for file in done], documents=documents)
    groups = group_splits(file.with_name(f"{file.name}{GROUPS}") for file in done)
    shared = common_content(keys[VALIDATION], keys[TRAIN])
    return ContentFacts(shared, replace(repeated_content(keys[TRAIN]), ids=ids), groups)


def shared_from(content: Any) -> Shared:
    """From JSON.

    Raises:
        one of `bounded.BAD_CONTENT`: it is something else.
    """
    return Shared({str(name): _pair(own) for name, own in content["items"].items()}, _pair(content["texts"]))


def _repeated(content: Any) -> Repeated:
    items = {str(name): _pair(own) for name, own in content["items"].items()}
    ids = None if content["ids"] is None else _pair(content["ids"])
    return Repeated(_pair(content["documents"]), items, _pair(content["texts"]), ids)


def _groups(content: Any) -> GroupSplits:
    return GroupSplits(int(content["both"]), str(content["example"]), int(content["hashed"]))


def _pair(pair: Any) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def _identity(folder: Path, manifest: Manifest) -> list[str]:
    return [identity_of(folder, manifest, split=split) for split in _SPLITS]


def _keep(folder: Path, manifest: Manifest, found: ContentFacts, keys: SetKeys) -> None:
    """Write atomically; a folder that cannot be written to is not an error."""
    file = folder / _FILE
    named: list[tuple[str, str | None, Keys]] = [
        (split, name, np.sort(own[:_MOST_KEYS])) for split in _SPLITS for name, own in keys[split].items.items()
    ]
    named += [(split, None, np.sort(keys[split].texts[:_MOST_KEYS])) for split in _SPLITS]
    stream = io.BytesIO()
    np.save(stream, np.concatenate([own for *_, own in named]))
    data = stream.getvalue()
    counts = [[split, name, len(own)] for split, name, own in named]
    kept = {"of": _identity(folder, manifest), "keys": {"counts": counts, "crc32": zlib.crc32(data)}, **asdict(found)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _KEYS, data)
        write_atomic(file, json.dumps(kept))
    except OSError as error:
        log.warning("data: %s cannot be written: the documents are compared again: %s", file, error)
