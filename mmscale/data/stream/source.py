"""One split of one prepared data set: its parts as one range of documents.

It reads whole documents and does not depend on sequences and order; table.py has their lengths and modalities.
K modalities, D documents.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from mmscale.data.prepared.label_masks import read_mask
from mmscale.data.prepared.manifest import check_vocabulary, parts_of, read_manifest
from mmscale.data.prepared.selection import DocumentWeights
from mmscale.data.stream.table import DocumentRows, DocumentTable
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError

# A part needs three file descriptors (mcore keeps .idx, .bin and the map of .bin open); the usual limit is 1024.
OPEN_PARTS = 128
_AGAIN = "run `mmscale data prepare` again: only damaged parts are made again after you delete them"


@dataclass(frozen=True, eq=False)
class _OpenPart:
    """An open part.

    Its views point into memory maps that end with `dataset`: later reads would be a segmentation fault.
    """

    dataset: IndexedDataset
    tokens: NDArray[Any]  # all token ids of the part


class Source:
    """The documents of one split, numbered 0..D-1 across its parts in the manifest's order.

    Attributes:
        folder: the data set's folder.
        split: name of the split.
        tokenizers: fingerprints of the tokenizers that made the ids, as in the manifest.
        tokens: of all documents.
        text: UTF-8 bytes of texts and labels of the first modality, in documents whose text is trained on; None: the
            bytes were not counted.
        identity: hash that changes when the documents or their weights do.
        selection: weights of the documents; None: each is read once per epoch.

    Args:
        folder: folder written by `mmscale data prepare`.
        split: name of the split.
        vocabulary: the configuration's vocabulary; the data must have been prepared with the same.
        selection: names the weights of the documents, as `SelectionFile.identity`; empty: none.

    Raises:
        DataError: the data set is missing, damaged, empty, has no such split or another vocabulary.
    """

    def __init__(self, folder: Path, *, split: str, vocabulary: Vocabulary, selection: str = "") -> None:
        manifest = read_manifest(folder)
        check_vocabulary(folder, manifest, vocabulary)
        self.folder = folder
        self.split = split
        self.tokenizers = manifest.tokenizers
        self._parts = parts_of(folder, manifest, split)
        self._ends = np.cumsum([part.documents for part in self._parts])
        self._table = DocumentTable(folder, self._parts, manifest.modalities)
        self.tokens = sum(sum(part.tokens.values()) for part in self._parts)
        texts = [(part.text_bytes, part.text_labels) for part in self._parts]
        known = [(size, labels) for size, labels in texts if size is not None]
        self.text = (sum(one[0] for one in known), sum(one[1] for one in known)) if len(known) == len(texts) else None
        listing: list[Any] = [split, manifest.vocabulary, manifest.source, [part.listing for part in self._parts]]
        if self._table.whole:
            listing.append(zlib.crc32(self.lengths.tobytes()))
        self._content = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]
        self.identity = self._content
        self.selection: DocumentWeights | None = None
        self._select(selection)
        self._open: OrderedDict[int, _OpenPart] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the open files, for worker processes that do not fork."""
        return {**self.__dict__, "_open": OrderedDict()}

    def under(self, selection: str) -> Source:
        """The same documents with these weights; empty: none.

        Raises:
            DataError: the weights are gone or damaged.
        """
        if selection == (self.selection.identity if self.selection else ""):
            return self
        other = copy.copy(self)
        other._open = OrderedDict()
        other._select(selection)
        return other

    def _select(self, selection: str) -> None:
        """Set the weights. The names of cached packings depend on them."""
        self.selection = DocumentWeights(self.folder, selection, documents=len(self)) if selection else None
        self.identity = f"{self._content}+{selection}" if selection else self._content

    def of_epoch(self, documents: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Numbers of documents, in their order, each as often as the epoch reads it: int64 [n] -> [m]."""
        return documents if self.selection is None else self.selection.repeated(documents, epoch)

    @property
    def composes(self) -> bool:
        """Whether documents are read together with neighbours."""
        return False

    def composed(
        self, documents: NDArray[np.int64], *, epoch: int, seed: int, position: int, seq_length: int
    ) -> NDArray[np.int64]:
        """Numbers of what an epoch reads for these documents, int64 [n] -> [n]: here the documents themselves.

        A source with neighbours numbers composites, which depend on the other arguments.
        """
        return documents

    def queries(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents for which `composed` returned these numbers, int64 [n]."""
        return numbers

    def own_rows(self, numbers: NDArray[np.int64], rows: DocumentRows) -> DocumentRows:
        """Rows of `queries(numbers)` without their neighbours.

        Args:
            numbers: as returned by `composed` [n].
            rows: of `numbers`.
        """
        return rows

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._ends[-1])

    def rows(self, documents: NDArray[np.integer]) -> DocumentRows:
        """Lengths, modalities and loss masks of n documents, in the given order.

        Args:
            documents: numbers in the split [n].

        Raises:
            DataError: a table is missing or damaged.
        """
        return self._table.rows(documents)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, int32 [D]: needs memory for every document of the split."""
        return self._table.lengths()

    def read(self, documents: NDArray[np.integer], table: DocumentRows | None = None) -> NDArray[np.int64]:
        """Token ids of some documents one after another, a copy, int64 [sum of their lengths].

        Args:
            documents: their numbers.
            table: the result of `rows` for them, if it is available.

        Raises:
            DataError: a part is damaged.
        """
        lengths = (table or self.rows(documents)).lengths
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        parts = np.searchsorted(self._ends, documents, side="right")
        begin = 0
        for number, document, end in zip(parts.tolist(), documents.tolist(), ends.tolist(), strict=True):
            part = self._open.get(number) or self._open_part(number)
            place = document - int(self._ends[number])  # negative, i.e. counted from the part's end
            out[begin:end] = self._ids(part, number, place, end - begin)
            out[begin:end] += self._parts[number].id_offset or 0
            begin = end
        return out

    def trained(
        self, documents: NDArray[np.integer], table: DocumentRows, modality: NDArray[np.int8]
    ) -> NDArray[np.bool_]:
        """Whether each token of some documents is trained on as a label, bool [sum of their lengths].

        Args:
            documents: their numbers.
            table: the result of `rows` for them.
            modality: of each token.

        Raises:
            DataError: a mask is damaged.
        """
        ends = np.cumsum(table.lengths)
        starts, of_token = ends - table.lengths, np.repeat(np.arange(len(documents)), table.lengths)
        found: NDArray[np.bool_] = table.trained[of_token, modality]
        found[starts] = False
        parts = np.searchsorted(self._ends, documents, side="right")
        for number in np.unique(parts).tolist():
            part = self._parts[number]
            if not part.masked:
                continue
            chosen = np.flatnonzero(parts == number)
            index = (self._open.get(number) or self._open_part(number)).dataset.index
            places = documents[chosen] - (int(self._ends[number]) - part.documents)
            spans = [
                (int(index.sequence_pointers[place]) // index.dtype_size, int(table.lengths[one]))
                for place, one in zip(places.tolist(), chosen.tolist(), strict=True)
            ]
            for one, mask in zip(chosen.tolist(), read_mask(self.folder, part, spans), strict=True):
                own = slice(int(starts[one]), int(ends[one]))
                labels = np.bincount(modality[own][mask], minlength=table.labels.shape[1])
                if mask[0] or (labels != table.labels[one]).any():
                    raise DataError(
                        f"data: the mask of {self.where(int(documents[one]))} has {labels.tolist()} labels per "
                        f"modality, its table {table.labels[one].tolist()}",
                        remedy=_AGAIN,
                    )
                found[own] = mask
        return found

    def where(self, document: int) -> str:
        """A document's place, for messages."""
        number = int(np.searchsorted(self._ends, document, side="right"))
        start = int(self._ends[number]) - self._parts[number].documents
        return f"document {document - start} of {self.folder / self._parts[number].prefix}"

    def _ids(self, part: _OpenPart, number: int, place: int, length: int) -> NDArray[Any]:
        """Token ids of a document, a view, after checking the index against the table."""
        path = self.folder / self._parts[number].prefix
        if part.dataset.index.sequence_lengths[place] != length:
            raise DataError(f"data: {path}.idx and {path}.meta.npy disagree about lengths of documents", remedy=_AGAIN)
        pointer = int(part.dataset.index.sequence_pointers[place]) // part.dataset.index.dtype_size
        if pointer < 0 or pointer + length > len(part.tokens):
            raise DataError(f"data: {path}.idx points outside {path}.bin", remedy=_AGAIN)
        return part.tokens[pointer : pointer + length]

    def _open_part(self, number: int) -> _OpenPart:
        """Open a part; closes the one that was opened first if too many are open."""
        part = self._parts[number]
        path = self.folder / part.prefix
        try:
            dataset = IndexedDataset(str(path))
        except (AssertionError, ValueError, OSError, struct.error) as error:
            raise DataError(f"data: {path}.idx or .bin cannot be read: {error}", remedy=_AGAIN) from error
        index = dataset.index
        if len(index.sequence_lengths) != part.documents:
            raise DataError(f"data: {path}.idx and {path}.meta.npy disagree about lengths of documents", remedy=_AGAIN)
        total = part.bin_bytes // index.dtype_size
        opened = _OpenPart(dataset, dataset.bin_reader.read(dtype=index.dtype, count=total, offset=0))
        if len(self._open) >= OPEN_PARTS:
            self._open.popitem(last=False)
        self._open[number] = opened
        return opened
