"""Finds duplicates and contaminated documents of a data set in several processes and bounded memory.

work.py has the two passes over the data; here their results are joined to clusters. A scratch folder holds the
temporary files: about 1,000 bytes a document.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.clusters import DuplicateCluster, DuplicateForest, chunks, largest
from mmscale.data.dedup.compared import ContentReader, DocumentRange
from mmscale.data.dedup.compared_files import Compared
from mmscale.data.dedup.contamination import PHRASE, HeldOutContent
from mmscale.data.dedup.work import DedupWork, compare_ranges, found_in, pairs_file, ranges_of, read_pieces
from mmscale.data.progress import Reporter
from mmscale.errors import DataError

SHOWN = 10  # largest clusters that are reported
_PREFIX, _LOCK = "mmscale-dedup-", "lock"


@dataclass(frozen=True)
class Duplicates:
    """The findings for the D documents of a training split.

    Attributes:
        keep: bool [D].
        duplicates: number of documents that are like an earlier one.
        contaminated: number of documents with content of held-out ones, by the kind of content; a document may have
            several.
        clusters: number of clusters.
        largest: the largest ones, with the start of the text of their first document.
    """

    keep: NDArray[np.bool_]
    duplicates: int
    contaminated: dict[str, int]
    clusters: int
    largest: list[tuple[DuplicateCluster, str]]


def find(work: DedupWork, *, max_cluster: int, workers: int, reporter: Reporter) -> Duplicates:
    """Look for duplicates in the training split of a data set; pieces that are done already are not done again.

    Args:
        work: the data set and what to look for.
        max_cluster: different contents that one cluster may have.
        workers: processes.
        reporter: shows the progress.

    Raises:
        DataError: the data set is damaged, or a cluster is too large.
    """
    documents = work.documents
    forest, held_out = _compared(work, workers=workers, reporter=reporter)
    number, found = largest(forest, work.scratch / "sizes", documents, Compared(work.blocks), count=SHOWN)
    reader = ContentReader(work.folder, split="train", draw=False)
    shown = [(one, _text(reader, work.pieces, one.first)) for one in found]
    _refuse_large(work.folder, shown, max_cluster)
    keep = np.concatenate([forest.roots(np.arange(*chunk)) == np.arange(*chunk) for chunk in chunks(documents)])
    duplicates = documents - int(keep.sum())
    contaminated = _contaminated(work, keep, held_out)
    return Duplicates(keep, duplicates, contaminated, number, shown)


def clusters_of(work: DedupWork, *, workers: int, reporter: Reporter) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The cluster of each document, whatever the sizes of clusters.

    Args:
        work: the data set and what to look for.
        workers: processes.
        reporter: shows the progress.

    Returns:
        The smallest number of each document's cluster, int64 [D], and whether the document has no content of held-out
        ones, bool [D].

    Raises:
        DataError: the data set is damaged.
    """
    forest, held_out = _compared(work, workers=workers, reporter=reporter)
    clean = np.ones(work.documents, bool)
    _contaminated(work, clean, held_out)
    return np.concatenate([forest.roots(np.arange(*chunk)) for chunk in chunks(work.documents)]), clean


def _compared(work: DedupWork, *, workers: int, reporter: Reporter) -> tuple[DuplicateForest, HeldOutContent | None]:
    """Do both passes; returns the clusters and the contents of held-out documents."""
    held_out = None
    if work.against:
        with reporter.part("reading held-out documents"):
            held_out = work.held_out()
    with reporter.bar("documents", work.documents) as advance:
        read_pieces(work, work.pieces, held_out, workers=workers, advance=advance)
    ranges = ranges_of(work)
    assert ranges is not None, "all slices are read"
    with reporter.bar("ranges of keys", len(ranges)) as advance:
        compare_ranges(work, ranges, workers=workers, advance=advance)
    forest = DuplicateForest(work.scratch / "forest", work.documents)
    for one in ranges:
        forest.join(np.load(pairs_file(work, one)))
    return forest, held_out


@contextlib.contextmanager
def own_folder(scratch: Path) -> Iterator[Path]:
    """A new folder in `scratch`, removed at the end; those of processes that were killed are removed first."""
    scratch.mkdir(parents=True, exist_ok=True)
    for lock in scratch.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r") as held:  # its process is alive, or there are no locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        own = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=scratch, ignore_cleanup_errors=True))
        )
        held = stack.enter_context((own / _LOCK).open("w"))
        with contextlib.suppress(OSError):  # a file system without locks: the files of killed processes are not removed
            fcntl.flock(held, fcntl.LOCK_EX)
        yield own


def _contaminated(work: DedupWork, keep: NDArray[np.bool_], held_out: HeldOutContent | None) -> dict[str, int]:
    """Removes contaminated documents from `keep`; returns the numbers of those removed, by kind of content."""
    if held_out is None:
        return {}
    often = np.zeros(len(held_out.grams), np.int64)
    for piece in work.pieces:
        _, gram, place = found_in(work, piece)
        often += np.bincount(gram[keep[piece.first + place]], minlength=len(often))
    found = {"items": 0, "texts": 0, "runs of words": 0}
    for piece in work.pieces:
        own = keep[piece.first : piece.first + piece.stop - piece.start]
        flags, gram, place = found_in(work, piece)
        rare = np.zeros(len(own), bool)
        rare[place[often[gram] <= PHRASE]] = True
        for name, flag in zip(found, (*flags.T, rare), strict=True):
            found[name] += int((flag & own).sum())
        own &= ~(flags.any(axis=1) | rare)
    return found


def _text(reader: ContentReader, pieces: Sequence[DocumentRange], document: int) -> str:
    """The start of a document's text."""
    piece = max((one for one in pieces if one.first <= document), key=lambda one: one.first)
    text = " ".join(reader.text(piece, document - piece.first).split())
    return text if len(text) <= 60 else text[:59] + "…"


def _refuse_large(folder: Path, shown: Sequence[tuple[DuplicateCluster, str]], most: int) -> None:
    for one, text in shown:
        if one.contents > most:
            raise DataError(
                f"data: a cluster of {folder} has {one.documents} documents with {one.contents} different contents, "
                f"more than {most}; its first is document {one.first}: {text!r}",
                remedy="look at that document: near duplicates may be linked through a text that all have. Raise "
                "--similarity, or allow it with --max-cluster",
            )
