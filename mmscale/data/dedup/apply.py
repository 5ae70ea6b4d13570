"""`mmscale data dedup`: finds duplicates in a data set and stores the result as weights of its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmscale.data.dedup.find import find
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.digests import digest_of
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, MANIFEST, TRAIN, has_documents, parts_of, read_manifest
from mmscale.data.prepared.selection import remove_layer, write_layer
from mmscale.data.progress import Reporter
from mmscale.errors import DataError

LAYER = "dedup"
_SCRATCH = ".cache/dedup"  # inside the data set
MOST_SHARE, MOST_LEAST = 0.01, 1000  # default limit of a cluster: this share of the documents, but at least this number


def dedup(
    folder: Path,
    *,
    rule: DuplicateRule,
    against: Sequence[Path] = (),
    held_out: bool = True,
    max_cluster: int | None = None,
    scratch: Path | None = None,
    workers: int = 1,
    reporter: Reporter,
) -> dict[str, Any]:
    """From now on exclude duplicates and contaminated documents of the training split.

    Args:
        folder: a prepared data set.
        rule: when two documents are duplicates.
        against: further data sets with held-out documents; of data sets without a held-out split all documents are
            used.
        held_out: whether its own held-out documents are used too.
        max_cluster: different contents that one cluster may have; default: a hundredth of the documents, at least 1000.
        scratch: folder for a folder of temporary files, about 1,000 bytes a document; default: .cache inside the
            data set.
        workers: processes.
        reporter: shows the progress.

    Returns:
        The findings, ready for JSON.

    Raises:
        DataError: a data set is missing or damaged, a cluster is too large, or no document would be left. Nothing is
            changed then.
    """
    manifest = read_manifest(folder)
    parts = parts_of(folder, manifest, TRAIN)
    documents = sum(part.documents for part in parts)
    sets = [(folder, HELD_OUT)] if held_out and has_documents({folder: manifest}, HELD_OUT) else []
    for other in against:
        if other.resolve() == folder.resolve():
            raise DataError(
                f"data: --against {other} is the data set itself",
                remedy="leave it out: its own held-out documents count anyway",
            )
        own = read_manifest(other)
        sets.append((other, HELD_OUT if has_documents({other: own}, HELD_OUT) else TRAIN))
    most = max(MOST_LEAST, int(MOST_SHARE * documents)) if max_cluster is None else max_cluster
    found = find(
        folder,
        rule=rule,
        against=sets,
        scratch=folder / _SCRATCH if scratch is None else scratch,
        max_cluster=most,
        workers=workers,
        reporter=reporter,
    )
    result: dict[str, Any] = {
        "documents": documents,
        "kept": int(found.keep.sum()),
        "duplicates": found.duplicates,
        "contaminated": found.contaminated,
        "clusters": found.clusters,
        "largest": [asdict(cluster) | {"text": text} for cluster, text in found.largest],
        "rule": asdict(rule),
        "against": [f"{path} ({split}), manifest {digest_of(path / MANIFEST)}" for path, split in sets],
    }
    of = identity_of(folder, manifest)
    selection = write_layer(folder, manifest, parts, found.keep, name=LAYER, of=of, made=result)
    return {"folder": str(folder)} | result | {"selection": selection.identity}


def undo(folder: Path) -> bool:
    """Stop excluding duplicates; False: none were excluded.

    Raises:
        DataError: the data set or its selection is missing or damaged.
    """
    manifest = read_manifest(folder)
    parts = parts_of(folder, manifest, TRAIN)
    return remove_layer(folder, manifest, parts, name=LAYER, of=identity_of(folder, manifest))
