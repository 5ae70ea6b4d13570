"""One split of one prepared data set: its parts behind one document number, with tables of lengths and modalities.

Reads whole documents only; it knows nothing of sequences or order. K modalities, D documents.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from mmscale.data.manifest import FIRST_MODALITY, check_vocabulary, checked_table, parts_of, read_manifest
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError

# A part costs three file descriptors (mcore keeps .idx, .bin and the map of .bin); a process has usually 1024.
OPEN_PARTS = 128
_AGAIN = "run `mmscale data prepare` again: only damaged parts are made anew after you delete them"


@dataclass(frozen=True, eq=False)
class _OpenPart:
    """The views point into memory maps that die with `dataset`: reading them afterwards is a segmentation fault."""

    dataset: IndexedDataset
    tokens: NDArray[Any]  # all token ids of the part
    pointers: NDArray[np.int64]  # first token of each document


class Source:
    """The documents of one split, numbered 0..D-1 across its parts in the manifest's order.

    Attributes:
        folder: the data set's folder.
        split: name of the split.
        tokenizers: fingerprints of those that made the ids, as in the manifest.
        lengths: tokens of each document, int32 [D].
        counts: tokens per modality of each document, int32 [D, K].
        labels: labels per modality that are trained on, int32 [D, K]. A label is the next token of the same document.
        trained: whether labels of a modality are trained on, bool [D, K].
        identity: hash that changes when the documents do.

    Args:
        folder: folder written by `mmscale data prepare`.
        split: name of the split.
        vocabulary: the configuration's vocabulary; the data must have been prepared with the same.

    Raises:
        DataError: the data set is missing, damaged, empty, has no such split or another vocabulary.
    """

    def __init__(self, folder: Path, *, split: str, vocabulary: Vocabulary) -> None:
        manifest = read_manifest(folder)
        check_vocabulary(folder, manifest, vocabulary)
        self.folder = folder
        self.split = split
        self.tokenizers = manifest.tokenizers
        self._parts = parts_of(folder, manifest, split)
        tables = [checked_table(folder, part, manifest.modalities) for part in self._parts]
        self._ends = np.cumsum([part.documents for part in self._parts])
        table = np.concatenate(tables)
        modalities = len(manifest.modalities)
        self.counts = table[:, :modalities].astype(np.int32)
        self.lengths = self.counts.sum(axis=1, dtype=np.int32)
        self.trained = (table[:, modalities, None] >> np.arange(modalities)) & 1 == 1
        labels = self.counts.copy()
        labels[:, FIRST_MODALITY] -= 1
        self.labels = labels * self.trained
        listing = [split, manifest.vocabulary, manifest.source, [part.model_dump() for part in self._parts]]
        content = json.dumps([*listing, zlib.crc32(self.lengths.tobytes())], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._open: OrderedDict[int, _OpenPart] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files, for worker processes that do not fork."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def read(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids of some documents one after another, a copy, int64 [sum of their lengths].

        Raises:
            DataError: a part is damaged.
        """
        ends = np.cumsum(self.lengths[documents])
        out = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        parts = np.searchsorted(self._ends, documents, side="right")
        begin = 0
        for number, document, end in zip(parts.tolist(), documents.tolist(), ends.tolist(), strict=True):
            part = self._open.get(number) or self._open_part(number)
            pointer = part.pointers[document - int(self._ends[number])]  # negative: counted from the part's end
            out[begin:end] = part.tokens[pointer : pointer + end - begin]
            begin = end
        return out

    def where(self, document: int) -> str:
        """A document's place, for messages."""
        number = int(np.searchsorted(self._ends, document, side="right"))
        start = int(self._ends[number]) - self._parts[number].documents
        return f"document {document - start} of {self.folder / self._parts[number].prefix}"

    def _open_part(self, number: int) -> _OpenPart:
        """Open a part, check it against the tables, and close the one that was opened longest ago."""
        part = self._parts[number]
        end = int(self._ends[number])
        path = self.folder / part.prefix
        try:
            dataset = IndexedDataset(str(path))
        except (AssertionError, ValueError, OSError, struct.error) as error:
            raise DataError(f"data: {path}.idx or .bin cannot be read: {error}", remedy=_AGAIN) from error
        index = dataset.index
        lengths = self.lengths[end - part.documents : end]
        pointers = index.sequence_pointers // index.dtype_size
        if not np.array_equal(index.sequence_lengths, lengths):
            raise DataError(f"data: {path}.idx and {path}.meta.npy disagree about lengths of documents", remedy=_AGAIN)
        total = part.bin_bytes // index.dtype_size
        if (pointers < 0).any() or (pointers + lengths > total).any():
            raise DataError(f"data: {path}.idx points outside {path}.bin", remedy=_AGAIN)
        opened = _OpenPart(dataset, dataset.bin_reader.read(dtype=index.dtype, count=total, offset=0), pointers)
        if len(self._open) >= OPEN_PARTS:
            self._open.popitem(last=False)
        self._open[number] = opened
        return opened
