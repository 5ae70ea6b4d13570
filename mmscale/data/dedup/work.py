"""The two passes of deduplication over a data set, in pieces whose results are files: any process may do any piece.

First pass: the documents of a slice are read, their records and a sorted run of keys are written. Second pass: the
documents with a key in common, for a range of keys, are compared. A piece whose file exists is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.compared import ContentReader, DocumentRange, slices
from mmscale.data.dedup.compared_files import Compared, RecordBlock
from mmscale.data.dedup.contamination import HeldOutContent, read_held_out
from mmscale.data.dedup.pairs import RANGE, DuplicateRule, edges, merged
from mmscale.data.dedup.picture_hashes import PictureHash, joined
from mmscale.data.dedup.signers import signer
from mmscale.data.prepared.manifest import parts_of, read_manifest
from mmscale.data.process_pool import map_in_processes
from mmscale.runtime.atomic_files import open_atomic

_TOGETHER = 1 << 14  # pictures that are compared with held-out ones at once: 10 MB
KeyRange = tuple[int, int | None]  # keys from .. up to; None: to the end


@dataclass(frozen=True)
class DedupWork:
    """The inputs of all pieces.

    Attributes:
        folder: the data set.
        scratch: folder of the temporary files, about 1,000 bytes a document.
        pieces: slices of the training split.
        blocks: where the records of the documents are.
        rule: when two documents are duplicates.
        against: folders and splits of held-out documents.
    """

    folder: Path
    scratch: Path
    pieces: tuple[DocumentRange, ...]
    blocks: tuple[RecordBlock, ...]
    rule: DuplicateRule
    against: tuple[tuple[Path, str], ...]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.blocks[-1].stop

    def shares(self) -> list[tuple[DocumentRange, ...]]:
        """The slices of each block."""
        return [tuple(one for one in self.pieces if block.first <= one.first < block.stop) for block in self.blocks]

    def held_out(self) -> HeldOutContent | None:
        """The contents of the held-out documents, read now; None: there are none."""
        if not self.against:
            return None
        return read_held_out(self.against, distance=self.rule.distance if self.rule.draws else -1)


def plan_work(
    folder: Path, scratch: Path, *, rule: DuplicateRule, against: Sequence[tuple[Path, str]], blocks: int = 1
) -> DedupWork:
    """Divide the work, and create the files of the records.

    Args:
        folder: the data set.
        scratch: exists.
        rule: when two documents are duplicates.
        against: folders and splits of held-out documents.
        blocks: folders of records; a block is written on one machine.
    """
    pieces = tuple(slices(parts_of(folder, read_manifest(folder), "train")))
    blocks = min(blocks, len(pieces))
    firsts = [pieces[len(pieces) * number // blocks].first for number in range(blocks)]
    stops = [*firsts[1:], pieces[-1].first + pieces[-1].stop - pieces[-1].start]
    made = [RecordBlock(scratch / f"block-{first}", first, stop) for first, stop in zip(firsts, stops, strict=True)]
    for block in made:
        block.create()
    return DedupWork(folder, scratch, pieces, tuple(made), rule, tuple(against))


def read_pieces(
    work: DedupWork,
    pieces: Sequence[DocumentRange],
    held_out: HeldOutContent | None,
    *,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """First pass over some slices.

    Args:
        work: the inputs.
        pieces: the slices.
        held_out: `work.held_out()`.
        workers: processes.
        advance: called with the number of documents that are done.

    Raises:
        DataError: the data set is damaged, or a process was killed.
    """
    done = 0
    missing = unread(work, pieces)
    for piece, _ in zip(missing, map_in_processes(partial(_read, work, held_out), missing, workers), strict=True):
        done += piece.stop - piece.start
        advance(done)


def unread(work: DedupWork, pieces: Sequence[DocumentRange]) -> list[DocumentRange]:
    """The slices of which the first pass has not been done."""
    return [piece for piece in pieces if not _run_of(work, piece).exists()]


def ranges_of(work: DedupWork) -> list[KeyRange] | None:
    """The ranges of keys of the second pass; None: a slice has not been read.

    They are equal ranges of the 64-bit keys. Keys are hashes, so all ranges have about the same number of entries.
    """
    if unread(work, work.pieces):
        return None
    entries = sum(len(np.load(_run_of(work, piece), mmap_mode="r")) for piece in work.pieces)
    count = max(1, -(-entries // RANGE))
    bounds = [(1 << 64) * number // count for number in range(count)]
    return list(zip(bounds, [*bounds[1:], None], strict=True))


def compare_ranges(
    work: DedupWork, ranges: Sequence[KeyRange], *, workers: int, advance: Callable[[int], None]
) -> None:
    """Second pass over some ranges of keys; arguments and errors as of `read_pieces`."""
    missing = [one for one in ranges if not pairs_file(work, one).exists()]
    for number, _ in enumerate(map_in_processes(partial(_compare, work), missing, workers)):
        advance(number + 1)


def pairs_file(work: DedupWork, bounds: KeyRange) -> Path:
    """The file with the pairs of duplicates of a range of keys."""
    return work.scratch / f"pairs-{bounds[0]}.npy"


def found_in(work: DedupWork, piece: DocumentRange) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """What the documents of a slice have of held-out ones.

    Returns:
        Whether they have an item or a text [n, 2]; numbers of runs of words, and the documents that have them, counted
        from the slice's first [m].
    """
    flags = np.load(work.scratch / f"flags-{piece.first}.npy")
    gram, place = np.load(work.scratch / f"grams-{piece.first}.npy").T
    return flags, gram, place


def _run_of(work: DedupWork, piece: DocumentRange) -> Path:
    """The file with the keys of a slice; it is written last."""
    return work.scratch / f"run-{piece.first}.npy"


def _read(work: DedupWork, held_out: HeldOutContent | None, piece: DocumentRange) -> None:
    """First pass over a slice."""
    reader = ContentReader(work.folder, split="train", draw=work.rule.draws)
    records = Compared(work.blocks)
    sign = signer(work.rule.minhash) if work.rule.signs else None
    flags = np.zeros((piece.stop - piece.start, 2), bool)
    grams: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
    drawn: list[tuple[int, PictureHash]] = []
    for place, content in enumerate(reader.contents(piece)):
        hashes = records.add(piece.first + place, content, sign=sign)
        if held_out is not None:
            found = held_out.find(content)
            drawn += [(place, one) for one in hashes if not found.item]
            if len(drawn) >= _TOGETHER:
                _flag_pictures(flags, drawn, held_out)
            flags[place] = found.item, found.text
            grams.append(np.stack([found.grams, np.full(len(found.grams), place)], axis=1))
    records.flush(piece.first)
    if held_out is not None:
        _flag_pictures(flags, drawn, held_out)
        _save(work.scratch / f"flags-{piece.first}.npy", flags)
        _save(work.scratch / f"grams-{piece.first}.npy", np.concatenate(grams))
    _save(_run_of(work, piece), work.rule.keys(records, piece.first, piece.first + len(flags)))


def _flag_pictures(flags: NDArray[np.bool_], drawn: list[tuple[int, PictureHash]], held_out: HeldOutContent) -> None:
    """Mark documents with pictures that look like held-out ones, and forget the pictures.

    Args:
        flags: of the documents of a slice, as from `found_in`.
        drawn: document and hashes of each picture.
        held_out: the contents of held-out documents.
    """
    places = np.array([place for place, _ in drawn], np.int64)
    flags[places[held_out.looks_like(joined([one for _, one in drawn]))], 0] = True
    drawn.clear()


def _compare(work: DedupWork, bounds: KeyRange) -> None:
    """Second pass over a range of keys."""
    run = merged([_run_of(work, piece) for piece in work.pieces], *bounds)
    _save(pairs_file(work, bounds), edges(Compared(work.blocks), run, work.rule.alike))


def _save(file: Path, array: NDArray) -> None:
    """Write an array atomically, so that a file that exists is complete on all machines."""
    with open_atomic(file) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)
