"""Finds duplicates and contaminated documents of a data set in several processes and bounded memory.

First pass: each process reads slices of documents, writes their properties, and a sorted run of keys. Second pass: each
process takes ranges of keys and compares documents with a key in common. Then clusters are joined. A scratch folder
holds the temporary files: about 1,000 bytes a document.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.clusters import DuplicateCluster, DuplicateForest, chunks, largest
from mmscale.data.dedup.compared import Compared, ContentReader, Stretch, slices
from mmscale.data.dedup.contamination import PHRASE, HeldOutContent, read_held_out
from mmscale.data.dedup.pairs import RANGE, DuplicateRule, edges, merged
from mmscale.data.progress import Reporter
from mmscale.errors import DataError

SHOWN = 10  # largest clusters that are reported
_PREFIX, _LOCK = "mmscale-dedup-", "lock"
_Done = TypeVar("_Done")


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


@dataclass(frozen=True)
class _Work:
    """The inputs of a worker process."""

    folder: Path
    scratch: Path
    documents: int
    rule: DuplicateRule
    held_out: HeldOutContent | None


def find(
    folder: Path,
    *,
    rule: DuplicateRule,
    against: Sequence[tuple[Path, str]],
    scratch: Path,
    max_cluster: int,
    workers: int,
    reporter: Reporter,
) -> Duplicates:
    """Look for duplicates in the training split of a data set.

    Args:
        folder: the data set.
        rule: when two documents are duplicates.
        against: folders and splits of held-out documents.
        scratch: a folder that gets a folder of this call, which is removed at the end.
        max_cluster: different contents that one cluster may have.
        workers: processes.
        reporter: shows the progress.

    Raises:
        DataError: the data set is damaged, or a cluster is too large.
    """
    reader = ContentReader(folder, split="train", draw=False)
    documents = sum(part.documents for part in reader.parts)
    with _own_folder(scratch) as own:
        held_out = None
        if against:
            with reporter.part("reading held-out documents"):
                held_out = read_held_out(against, distance=rule.distance if rule.draws else -1)
        Compared(own, documents, write=True)
        work = _Work(folder, own, documents, rule, held_out)
        pieces = slices(reader.parts)
        entries = 0
        with reporter.bar("documents", documents) as advance:
            for piece, count in zip(pieces, in_processes(partial(_read, work), pieces, workers), strict=True):
                entries += count
                advance(piece.first + piece.stop - piece.start)
        ranges = list(_ranges(entries))
        forest = DuplicateForest(own / "forest", documents)
        with reporter.bar("ranges of keys", len(ranges)) as advance:
            for number, file in enumerate(in_processes(partial(_compare, work), ranges, workers)):
                forest.join(np.load(file))
                file.unlink()
                advance(number + 1)
        records = Compared(own, documents)
        number, found = largest(forest, own / "sizes", documents, records.facts, count=SHOWN)
        shown = [(one, _text(reader, pieces, one.first)) for one in found]
        _refuse_large(folder, shown, max_cluster)
        keep = np.concatenate([forest.roots(np.arange(*chunk)) == np.arange(*chunk) for chunk in chunks(documents)])
        duplicates = documents - int(keep.sum())
        contaminated = _contaminated(own, pieces, keep, held_out)
        return Duplicates(keep, duplicates, contaminated, number, shown)


@contextlib.contextmanager
def _own_folder(scratch: Path) -> Iterator[Path]:
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


def in_processes(work: Callable[[Any], _Done], jobs: Sequence[Any], workers: int) -> Iterator[_Done]:
    """Results in the order of the jobs."""
    if min(workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        try:
            yield from pool.map(work, jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ranges(entries: int) -> Iterable[tuple[int, int | None]]:
    """Equal ranges of the 64-bit keys. Keys are hashes, so all ranges have about the same number of entries."""
    count = max(1, -(-entries // RANGE))
    bounds = [(1 << 64) * number // count for number in range(count)]
    return zip(bounds, [*bounds[1:], None], strict=True)


def _read(work: _Work, piece: Stretch) -> int:
    """First pass over a slice; returns its number of keys."""
    reader = ContentReader(work.folder, split="train", draw=work.rule.draws)
    records = Compared(work.scratch, work.documents)
    flags = np.zeros((piece.stop - piece.start, 2), bool)
    grams: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
    for place, content in enumerate(reader.contents(piece)):
        looks = records.add(piece.first + place, content, text=work.rule.signs)
        if work.held_out is not None:
            found = work.held_out.find(content, looks)
            flags[place] = found.item, found.text
            grams.append(np.stack([found.grams, np.full(len(found.grams), place)], axis=1))
    run = work.rule.keys(records, piece.first, piece.first + piece.stop - piece.start)
    np.save(work.scratch / f"run-{piece.first}.npy", run)
    if work.held_out is not None:
        np.save(work.scratch / f"flags-{piece.first}.npy", flags)
        np.save(work.scratch / f"grams-{piece.first}.npy", np.concatenate(grams))
    return len(run)


def _compare(work: _Work, bounds: tuple[int, int | None]) -> Path:
    """Second pass over a range of keys; returns the file with its pairs."""
    records = Compared(work.scratch, work.documents)
    run = merged(sorted(work.scratch.glob("run-*.npy")), *bounds)
    file = work.scratch / f"pairs-{bounds[0]}.npy"
    np.save(file, edges(records, run, work.rule.alike))
    return file


def _contaminated(
    scratch: Path, pieces: Sequence[Stretch], keep: NDArray[np.bool_], held_out: HeldOutContent | None
) -> dict[str, int]:
    """Removes contaminated documents from `keep`; returns the numbers of those removed, by kind of content."""
    if held_out is None:
        return {}
    often = np.zeros(len(held_out.grams), np.int64)
    for piece in pieces:
        gram, place = np.load(scratch / f"grams-{piece.first}.npy").T
        often += np.bincount(gram[keep[piece.first + place]], minlength=len(often))
    found = {"items": 0, "texts": 0, "runs of words": 0}
    for piece in pieces:
        own = keep[piece.first : piece.first + piece.stop - piece.start]
        gram, place = np.load(scratch / f"grams-{piece.first}.npy").T
        flags = np.load(scratch / f"flags-{piece.first}.npy")
        rare = np.zeros(len(own), bool)
        rare[place[often[gram] <= PHRASE]] = True
        for name, flag in zip(found, (*flags.T, rare), strict=True):
            found[name] += int((flag & own).sum())
        own &= ~(flags.any(axis=1) | rare)
    return found


def _text(reader: ContentReader, pieces: Sequence[Stretch], document: int) -> str:
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
