"""Digests of the files of a data set, and of the content of its parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data import digests
from mmscale.data.prepared import canaries
from mmscale.data.prepared.folder import tokenizer_folders
from mmscale.data.prepared.manifest import MANIFEST, MOST_BYTES, Manifest
from mmscale.data.prepared.parts import FinishedPart, PartJob


def content_of_parts(jobs: Sequence[PartJob], parts: Sequence[FinishedPart]) -> str:
    """Digest of all parts if documents name files, which may change while the document files do not; otherwise "".

    Also "" if a part was made by a version that did not record the state of those files, so that the data set keeps its
    identity when a part is made again.
    """
    if not any(job.items for job in jobs) or any(part.items is None for part in parts):
        return ""
    return hashlib.sha256(json.dumps([part.digests for part in parts], sort_keys=True).encode()).hexdigest()


def without_content(out: Path, source: dict[str, Any]) -> bool:
    """Whether the manifest, even of a damaged data set, is of these documents and has no digest of parts."""
    try:
        found = bounded.read_object(out / MANIFEST, most=MOST_BYTES)
    except (OSError, *bounded.BAD_CONTENT):
        return False
    return found.get("source") == source["digest"] and not found.get("content")


def digests_of_set(out: Path, known: dict[str, str], files: Iterable[str], manifest: Manifest) -> dict[str, str]:
    """Digests of all files that training, evaluation and decoding read, except the manifest.

    Args:
        out: folder of the data set.
        known: digests of files that need not be read again, by path in the folder.
        files: of the parts.
        manifest: of the data set; names its tasks.
    """
    others = [out / name for name in files if name not in known]
    others += [*(out / task.file for task in manifest.tasks), *out.glob(canaries.FILE)]
    for folder in tokenizer_folders():
        others += sorted(file for file in (out / folder).rglob("*") if file.is_file())
    return digests.collect(out, known, others)
