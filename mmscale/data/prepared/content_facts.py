"""What the splits of a data set have in common and what training repeats: computed once, and kept beside the data.

shared_content.py compares; `data prepare` calls this, `data inspect` and the start of a run read the result.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import Manifest
from mmscale.data.prepared.parts import DONE
from mmscale.data.prepared.repeated_ids import SUFFIX, repeated_ids
from mmscale.data.prepared.shared_content import Repeated, Shared, comparable, content_of_splits
from mmscale.runtime.atomic_files import write_atomic

log = logging.getLogger(__name__)

_FILE = ".cache/content.json"  # inside the data set


@dataclass(frozen=True)
class ContentFacts:
    """What the splits have in common, and what training repeats."""

    shared: Shared
    repeated: Repeated

    def notes(self) -> list[str]:
        """Notes for the user."""
        return [*self.shared.notes(), *self.repeated.notes()]


def content_facts(folder: Path, manifest: Manifest) -> ContentFacts | None:
    """The facts, kept or computed; None: the documents cannot be compared, because they are of a Megatron corpus."""
    if not comparable(manifest):
        return None
    found = kept_facts(folder, manifest)
    if found is None:
        shared, repeated = content_of_splits(folder, manifest)
        names = {Path(part.prefix).name for split in manifest.splits.values() for part in split.parts}
        documents = sum(split.documents for split in manifest.splits.values())
        ids = repeated_ids([folder / DONE / f"{name}{SUFFIX}" for name in sorted(names)], documents=documents)
        found = ContentFacts(shared, replace(repeated, ids=ids))
        _keep(folder, manifest, found)
    return found


def kept_facts(folder: Path, manifest: Manifest) -> ContentFacts | None:
    """The facts if they were computed for these documents before."""
    try:
        content = bounded.read_object(folder / _FILE)
        if content["of"] != _identity(folder, manifest):
            return None
        return ContentFacts(Shared(**_pairs(content["shared"])), Repeated(**_pairs(content["repeated"])))
    except (OSError, *bounded.BAD_CONTENT):
        return None


def _pairs(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if pair is None else (int(pair[0]), int(pair[1])) for name, pair in values.items()}


def _identity(folder: Path, manifest: Manifest) -> list[str]:
    return [identity_of(folder, manifest, split=split) for split in (TRAIN, VALIDATION)]


def _keep(folder: Path, manifest: Manifest, found: ContentFacts) -> None:
    """Write atomically; a folder that cannot be written to is not an error."""
    file = folder / _FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"of": _identity(folder, manifest), **asdict(found)}))
    except OSError as error:
        log.warning("data: %s cannot be written: the documents are compared again: %s", file, error)
