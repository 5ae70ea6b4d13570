"""Pairs of similar documents: candidates have a key in common, then each pair is compared.

Keys are stored on disk as sorted runs, one for each slice of documents. Ranges of keys are merged one at a time, so
memory depends only on the size of a range. D documents, n pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.dedup.compared_files import Compared
from mmscale.data.dedup.picture_hashes import near, table_keys
from mmscale.data.dedup.signers import NUMPY
from mmscale.data.dedup.words import Hashes, band_keys

RUN = np.dtype([("key", "<u8"), ("document", "<i8")])
RANGE = 1 << 21  # size of a range [keys]: 32 MB, and about as much again while they are sorted
_NEIGHBOURS = 8  # a document is compared with the first document of the same key and with this many preceding ones
_PAIRS = 1 << 15  # pairs that are compared at once: 32 MB of signatures


@dataclass(frozen=True)
class DuplicateRule:
    """When two documents are duplicates. Documents whose sequences of kinds of parts differ never are.

    Attributes:
        match: "joint": if their texts and their items match; "text": if their texts match; "image": if their items
            match.
        similarity: lowest share of equal minima of the signatures of two matching texts.
        distance: bits in which the hashes of two pictures may differ; -1: their codes must be equal.
        exact: only equal texts and equal codes match.
        minhash: the program that computes signatures, from `signers.exact_name`.
    """

    match: str = "joint"
    similarity: float = 0.7
    distance: int = 2
    exact: bool = False
    minhash: str = NUMPY

    @property
    def draws(self) -> bool:
        """Whether pictures must be decoded."""
        return self.distance >= 0 and not self.exact and self.match != "text"

    @property
    def signs(self) -> bool:
        """Whether texts need signatures."""
        return not self.exact and self.match != "image"

    def alike(self, records: Compared, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether documents are duplicates, pair by pair [n]."""
        a, b = records.facts.of(one), records.facts.of(other)
        found = a["shape"] == b["shape"]
        if self.match != "image":
            same = a["text"] == b["text"]
            rows = np.flatnonzero(~same & (a["text"] != 0) & (b["text"] != 0) & found)
            if len(rows) and not self.exact:
                equal = records.signatures.of(one[rows]) == records.signatures.of(other[rows])
                same[rows] = equal.mean(axis=1) >= self.similarity
            found &= same
        if self.match != "text":
            same = a["items"] == b["items"]
            rows = np.flatnonzero(~same & a["looks"] & b["looks"] & (a["rest"] == b["rest"]) & found)
            if len(rows) and self.draws:
                same[rows] = near(records.hashes(one[rows]), records.hashes(other[rows]), distance=self.distance)
            found &= same
        return found

    def keys(self, records: Compared, first: int, stop: int) -> NDArray[np.void]:
        """Keys of the documents first..stop-1, as rows of RUN [n], sorted; documents with a key in common are compared.

        Args:
            records: facts of all documents.
            first: number of the first document.
            stop: one past the last.
        """
        facts = records.facts.between(first, stop)
        documents = np.arange(first, stop)
        found: list[tuple[Hashes, NDArray[np.int64]]] = []
        with_items, with_text = facts["items"] != 0, facts["text"] != 0
        if self.match == "text":
            by_text, by_items = with_text, np.zeros_like(with_text)
        else:  # an item is a better key than a caption, which may belong to many items
            by_text, by_items = (with_text & ~with_items) & (self.match == "joint"), with_items
        rows = np.flatnonzero(by_text)
        if len(rows):
            shape = facts["shape"][rows, None]
            own = facts["text"][rows, None] if self.exact else band_keys(records.signatures.of(first + rows))
            found.append((scattered(own ^ shape), documents[rows]))
        rows = np.flatnonzero(by_items)
        if len(rows):
            whole = facts["shape"][rows] ^ scattered(facts["items"][rows] + np.uint64(1))
            found.append((scattered(whole)[:, None], documents[rows]))
        rows = np.flatnonzero(by_items & facts["looks"])
        if len(rows) and self.draws:
            base = facts["shape"][rows] ^ facts["rest"][rows]
            own = table_keys(facts["bits"][rows], distance=self.distance)
            found.append((scattered(own ^ base[:, None]), documents[rows]))
        run = np.empty(sum(keys.size for keys, _ in found), RUN)
        at = 0
        for keys, numbers in found:
            some = run[at : at + keys.size]
            some["key"], some["document"] = keys.ravel(), np.repeat(numbers, keys.shape[1])
            at += keys.size
        run.sort(order=("key", "document"))
        return run


def candidates(run: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Pairs of documents with a key in common, int64 [n, 2], the smaller number first; at most 9 for each entry.

    Args:
        run: sorted by key and document.
    """
    key, document = run["key"], run["document"]
    for step in range(1, min(_NEIGHBOURS, len(run) - 1) + 1):
        places = np.flatnonzero(key[step:] == key[:-step])
        yield np.stack([document[places], document[places + step]], axis=1)
    if len(run):
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        group = np.cumsum(np.concatenate([[False], key[1:] != key[:-1]]))
        far = np.flatnonzero(np.arange(len(run)) - starts[group] > _NEIGHBOURS)
        yield np.stack([document[starts[group[far]]], document[far]], axis=1)


def merged(runs: list[Path], low: int, high: int | None) -> NDArray[np.void]:
    """Entries of all runs with low <= key < high, as rows of RUN [n], sorted by key and document.

    Args:
        runs: files of sorted rows.
        low: smallest key.
        high: one past the largest key; None: no limit.
    """
    found = []
    for file in runs:
        run = np.load(file, mmap_mode="r")
        keys = run["key"]
        start = int(np.searchsorted(keys, np.uint64(low)))
        stop = len(run) if high is None else int(np.searchsorted(keys, np.uint64(high)))
        found.append(np.array(run[start:stop]))
    joined = np.concatenate(found) if found else np.empty(0, RUN)
    return joined[np.lexsort((joined["document"], joined["key"]))]


def edges(
    records: Compared, run: NDArray[np.void], alike: Callable[[Compared, NDArray[np.int64], NDArray[np.int64]], NDArray]
) -> NDArray[np.int64]:
    """The duplicates among the candidates of a range of keys, int64 [n, 2], each pair once."""
    found = [np.empty((0, 2), np.int64)]
    for pairs in candidates(run):
        pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
        for start in range(0, len(pairs), _PAIRS):
            some = pairs[start : start + _PAIRS]
            found.append(some[alike(records, some[:, 0], some[:, 1])])
    return np.unique(np.concatenate(found), axis=0)
