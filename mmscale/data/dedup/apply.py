"""`mmscale data dedup`: finds duplicates in a data set and stores the result as weights of its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale.data.dedup import submitted
from mmscale.data.dedup.find import find, own_folder
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.dedup.work import DedupWork, plan_work
from mmscale.data.digests import digest_of
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, MANIFEST, TRAIN, has_documents, parts_of, read_manifest
from mmscale.data.prepared.selection import remove_layer, write_layer
from mmscale.data.progress import Reporter
from mmscale.errors import DataError

LAYER = "dedup"
SCRATCH = submitted.FOLDER
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
    request = checked_request(folder, against=against, held_out=held_out, max_cluster=max_cluster)
    with own_folder(folder / SCRATCH if scratch is None else scratch) as own:
        work = plan_work(folder, own, rule=rule, against=request.against)
        return write_found(work, request, workers=workers, reporter=reporter)


@dataclass(frozen=True)
class DedupRequest:
    """A checked request.

    Attributes:
        of: identity of the documents.
        against: folders and splits of held-out documents.
        max_cluster: different contents that one cluster may have.
    """

    of: str
    against: tuple[tuple[Path, str], ...]
    max_cluster: int

    def described(self) -> list[str]:
        """The held-out documents with digests of their manifests."""
        return [f"{path} ({split}), manifest {digest_of(path / MANIFEST)}" for path, split in self.against]


def checked_request(folder: Path, *, against: Sequence[Path], held_out: bool, max_cluster: int | None) -> DedupRequest:
    """Check the arguments of `dedup`, which describes them.

    Raises:
        DataError: a data set is missing or damaged, or compared with itself.
    """
    manifest = read_manifest(folder)
    documents = sum(part.documents for part in parts_of(folder, manifest, TRAIN))
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
    return DedupRequest(identity_of(folder, manifest), tuple(sets), most)


def write_found(work: DedupWork, request: DedupRequest, *, workers: int, reporter: Reporter) -> dict[str, Any]:
    """Do what is left of the work, and write the weights; arguments, result and errors as of `dedup`."""
    folder, manifest = work.folder, read_manifest(work.folder)
    found = find(work, max_cluster=request.max_cluster, workers=workers, reporter=reporter)
    result: dict[str, Any] = {
        "documents": work.documents,
        "kept": int(found.keep.sum()),
        "duplicates": found.duplicates,
        "contaminated": found.contaminated,
        "clusters": found.clusters,
        "largest": [asdict(cluster) | {"text": text} for cluster, text in found.largest],
        "rule": asdict(work.rule),
        "against": request.described(),
    }
    parts = parts_of(folder, manifest, TRAIN)
    selection = write_layer(folder, manifest, parts, found.keep, name=LAYER, of=request.of, made=result)
    return {"folder": str(folder)} | result | {"selection": selection.identity}


def undo(folder: Path) -> bool:
    """Stop excluding duplicates; False: none were excluded.

    Raises:
        DataError: the data set or its selection is missing or damaged.
    """
    manifest = read_manifest(folder)
    parts = parts_of(folder, manifest, TRAIN)
    removed = remove_layer(folder, manifest, parts, name=LAYER, of=identity_of(folder, manifest))
    submitted.forget_finished(folder)
    return removed
