"""One part of a data set: a Megatron IndexedDataset, written crash-safe and read without torch.

prepare.py cuts the input into parts and makes them in several processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.data.digests import Hasher
from mmscale.data.documents.schema import TRAIN, VALIDATION, Document, DocumentSlice, Rejected
from mmscale.data.modalities.modality import Tally, count
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.folder_lock import write_error
from mmscale.data.prepared.group_splits import SUFFIX as GROUPS
from mmscale.data.prepared.group_splits import keep_groups
from mmscale.data.prepared.label_masks import LABELS, MASK
from mmscale.data.prepared.manifest import MOST_BYTES, Part
from mmscale.data.prepared.mask_writer import MaskWriter
from mmscale.data.prepared.repeated_ids import SUFFIX, keep_ids
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import publish, sync, temporary_for, write_atomic

SPLITS = (TRAIN, VALIDATION)
SUFFIXES = (".bin", ".idx", ".meta.npy")
DONE = "done"
_CHUNK = 64  # documents tokenised together: one call of the image tokenizer, one check of the stop flag

# megatron/core/datasets/indexed_dataset.py: header, version, and the codes of its DType enum
HEADER = b"MMIDIDX\x00\x00"
_CODES: dict[np.dtype[Any], int] = {
    np.dtype(np.uint8): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.int32): 4,
    np.dtype(np.int64): 5,
    np.dtype(np.uint16): 8,
}
DTYPES = {code: dtype for dtype, code in _CODES.items()}


def suffixes_of(*, masked: bool) -> tuple[str, ...]:
    """Suffixes of the files of a part."""
    return (*SUFFIXES, MASK, LABELS) if masked else SUFFIXES


def dtype_for(vocabulary: Vocabulary) -> np.dtype[Any]:
    """Type of the ids on disk: uint16 if every id fits, otherwise int32.

    It is written into the index explicitly, because megatron uses two different thresholds, 65500 and 65536, and a
    vocabulary of Chameleon's 65536 ids falls between them.
    """
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)


class PartWriter:
    """Writes the files of one split of one part, `<prefix>.bin` and others, each under a unique temporary name first.

    megatron's own builder is not used, because it keeps Python lists and leaves half-written files.

    Args:
        folder: the data set.
        prefix: relative to the folder, without suffix.
        vocabulary: id ranges; an id outside is a bug of the caller and stops the writer, as numpy would wrap it.

    Attributes:
        digests: of the finished files, by their paths relative to the folder.
    """

    def __init__(self, folder: Path, prefix: str, vocabulary: Vocabulary) -> None:
        self.folder, self.prefix, self.vocabulary = folder, prefix, vocabulary
        self.dtype = dtype_for(vocabulary)
        self._lengths: list[int] = []
        self._rows: list[NDArray[np.int64]] = []
        self._text_bytes: int | None = 0
        self._text_labels = 0
        self._masks = MaskWriter(vocabulary)
        self._stream: BinaryIO | None = None
        self._hasher = Hasher()
        self._temporary = {suffix: temporary_for(self._path(suffix)) for suffix in suffixes_of(masked=True)}
        self.digests: dict[str, str] = {}

    def _path(self, suffix: str) -> Path:
        return self.folder / (self.prefix + suffix)

    def add(self, encoded: Encoded) -> None:
        """Append a document to the part.

        Raises:
            DataError: one of its ids is outside of the vocabulary.
        """
        if encoded.ids.min() < 0 or encoded.ids.max() >= self.vocabulary.size:
            raise DataError(
                f"{encoded.document.where}: an id of {encoded.document.id!r} is outside 0..{self.vocabulary.size - 1}",
                remedy="this is a bug of a tokenizer: report it",
            )
        if self._stream is None:
            self._path("").parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._temporary[".bin"].open("wb")
        content = encoded.ids.astype(self.dtype).tobytes()
        self._stream.write(content)
        self._hasher.update(content)
        self._lengths.append(len(encoded.ids))
        if encoded.loss & 1:
            counted = None if None in (self._text_bytes, encoded.text_bytes) else encoded.text_bytes
            self._text_bytes = None if counted is None else (self._text_bytes or 0) + counted
            self._text_labels += int(encoded.labels(self.vocabulary)[0])
        self._rows.append(np.append(encoded.tokens, encoded.loss))
        self._masks.add(encoded)

    def finish(self) -> Part | None:
        """Flush the files to disk and give them their final names; None if no document was added."""
        if self._stream is None:
            return None
        sync(self._stream)
        self._stream.close()
        table = np.stack(self._rows)
        content = io.BytesIO()
        np.save(content, table)
        tables = {".idx": index_bytes(self._lengths, self.dtype), ".meta.npy": content.getvalue()}
        for suffix, data in (tables | self._masks.files()).items():
            with self._temporary[suffix].open("wb") as stream:
                stream.write(data)
                sync(stream)
            whole = Hasher()
            whole.update(data)
            self.digests[self.prefix + suffix] = whole.hexdigest()
        self.digests[self.prefix + ".bin"] = self._hasher.hexdigest()
        written = suffixes_of(masked=self._masks.needed)
        publish([(self._temporary[suffix], self._path(suffix)) for suffix in written])
        tokens = dict(zip(self.vocabulary.names, table[:, :-1].sum(axis=0).tolist(), strict=True))
        sizes = [self._path(suffix).stat().st_size for suffix in (".bin", ".idx")]
        return Part(
            prefix=self.prefix,
            documents=len(table),
            tokens=tokens,
            bin_bytes=sizes[0],
            idx_bytes=sizes[1],
            text_bytes=self._text_bytes,
            text_labels=self._text_labels,
            masked=self._masks.needed,
        )

    def abort(self) -> None:
        """Remove the temporary files."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # on a full disk buffered bytes cannot be written; they are not needed
                self._stream.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)


def index_bytes(
    lengths: Sequence[int] | NDArray[np.integer], dtype: np.dtype[Any], *, starts: NDArray[np.int64] | None = None
) -> bytes:
    """The .idx file of megatron's IndexedDataset: one sequence per document.

    Args:
        lengths: tokens of each document.
        dtype: type of the ids in the .bin file.
        starts: where each document begins in the .bin file [tokens]; default: one after another.
    """
    sizes = np.asarray(lengths, dtype=np.int32)
    pointers = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    pointers = pointers if starts is None else starts
    head = HEADER + struct.pack("<QBQQ", 1, _CODES[dtype], len(sizes), len(sizes) + 1)
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    return head + sizes.tobytes() + (pointers * dtype.itemsize).tobytes() + documents.tobytes()


def read_document(folder: Path, part: Part, index: int) -> NDArray[np.int64]:
    """Ids of one document of a part, int64 [tokens], a copy.

    Raises:
        DataError: the index file is not one, or there is no such document.
    """
    if not 0 <= index < part.documents:
        raise DataError(f"data: part {part.prefix} has no document {index}", remedy=f"ask for 0..{part.documents - 1}")
    return next(read_documents(folder, part, index, index + 1))


def read_documents(folder: Path, part: Part, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
    """Ids of consecutive documents of a part, one by one; opens its files once. Otherwise as `read_document`."""
    file = folder / f"{part.prefix}.idx"
    head = struct.calcsize("<QBQQ")
    with file.open("rb") as stream:
        magic = stream.read(len(HEADER))
        fields = stream.read(head)
        if magic != HEADER or len(fields) < head:
            raise DataError(f"data: {file} is not an index file", remedy="run `mmscale data prepare` again")
        _, code, sequences, _ = struct.unpack("<QBQQ", fields)
        begin = len(HEADER) + head
        stream.seek(begin + 4 * start)
        lengths = np.frombuffer(stream.read(4 * (stop - start)), "<i4")
        stream.seek(begin + 4 * sequences + 8 * start)
        pointers = np.frombuffer(stream.read(8 * (stop - start)), "<i8")
    dtype = np.dtype(DTYPES[code])
    with (folder / f"{part.prefix}.bin").open("rb") as stream:
        for length, pointer in zip(lengths.tolist(), pointers.tolist(), strict=True):
            stream.seek(pointer)
            ids = np.frombuffer(stream.read(dtype.itemsize * length), dtype)
            yield np.asarray(ids, dtype=np.int64) + (part.id_offset or 0)


@dataclass(frozen=True)
class PartJob:
    """The inputs of one part.

    Attributes:
        index: number of the part.
        slices: its documents.
        tokenizers: fingerprints and limits that affect the ids.
    """

    index: int
    slices: tuple[DocumentSlice, ...]
    tokenizers: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name of the part."""
        return f"{self.index:05d}"

    @property
    def count(self) -> int:
        """Number of records."""
        return sum(piece.count for piece in self.slices)

    @property
    def items(self) -> str:
        """State of the files that the part's records name (sizes and times), hashed; "": they name none."""
        states = [getattr(piece, "items", "") for piece in self.slices]
        return hashlib.sha256(json.dumps(states).encode()).hexdigest() if any(states) else ""

    @property
    def digest(self) -> str:
        """Hash of everything that affects the part's files, except the files that its records name."""
        content = json.dumps([self.index, [piece.identity for piece in self.slices], self.tokenizers])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class FinishedPart:
    """The record done/<part>.json, written after the part's files. A part without it does not count."""

    digest: str
    splits: dict[str, Part]
    rejected: tuple[Rejected, ...]
    sizes: dict[str, int]  # relative path -> bytes, of every file of the part
    digests: dict[str, str] = field(default_factory=dict)  # likewise; empty in parts of older versions
    # counts of conversions of items, by modality; empty if there were none, and in parts of older versions
    tallies: dict[str, Tally] = field(default_factory=dict)
    items: str | None = ""  # PartJob.items; None in parts of older versions


class StoppedError(Exception):
    """Preparing was stopped while this part was being made."""


def build_part(
    folder: Path,
    job: PartJob,
    encoder: DocumentEncoder,
    *,
    held_out: float,
    strict: bool,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> FinishedPart:
    """Make one part; no file gets its final name before all of the part is on disk.

    Args:
        folder: the data set.
        job: which documents.
        encoder: documents to ids.
        held_out: share of documents for validation.
        strict: raise an error for the first bad document.
        advance: called with the number of further records that were read.
        stopped: called between chunks; true: stop.

    Raises:
        DataError: the disk is full, an input is gone, or strict and a document is bad.
        StoppedError: `stopped` returned true.
    """
    writers = {split: PartWriter(folder, f"{split}/{job.name}", encoder.vocabulary) for split in SPLITS}
    rejected: list[Rejected] = []
    kept: list[Document] = []
    encoder.take_tallies()  # discard the counts of an abandoned part
    try:
        for chunk in _chunks(job):
            if stopped():
                raise StoppedError
            documents = [item for item in chunk if isinstance(item, Document)]
            encoded = iter(encoder.encode(documents))
            for item in chunk:  # keeps rejections in the order of the input
                result = next(encoded) if isinstance(item, Document) else item
                if isinstance(result, Encoded):
                    kept.append(replace(result.document, content=()))
                    writers[result.document.split_for(held_out)].add(result)
                elif strict:
                    raise strict_error(result)
                else:
                    rejected.append(result)
            advance(len(chunk))
        splits = {split: part for split, writer in writers.items() if (part := writer.finish()) is not None}
        digests = {name: digest for writer in writers.values() for name, digest in writer.digests.items()}
        sizes, tallies = _sizes(folder, splits), encoder.take_tallies()
        finished = FinishedPart(job.digest, splits, tuple(rejected), sizes, digests, tallies, job.items)
        content = asdict(finished) | {"splits": {name: part.model_dump() for name, part in splits.items()}}
        (folder / DONE).mkdir(exist_ok=True)
        keep_ids(folder / DONE / f"{job.name}{SUFFIX}", [document.id for document in kept])
        keep_groups(folder / DONE / f"{job.name}{GROUPS}", kept, held_out=held_out)
        write_atomic(folder / DONE / f"{job.name}.json", json.dumps(content, indent=1).encode())
        return finished
    except OSError as error:
        raise write_error(error, folder) from error
    finally:
        for writer in writers.values():
            writer.abort()


def strict_error(rejected: Rejected) -> DataError:
    """The error for a bad document under --strict."""
    return DataError(
        f"{rejected.where}: document {rejected.id!r}: {rejected.reason}",
        remedy="mend it, or leave out --strict to skip it",
    )


def _chunks(job: PartJob) -> Iterator[list[Document | Rejected]]:
    records = (record for piece in job.slices for record in piece.read())
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _sizes(folder: Path, splits: dict[str, Part]) -> dict[str, int]:
    files = [part.prefix + suffix for part in splits.values() for suffix in suffixes_of(masked=part.masked)]
    return {file: (folder / file).stat().st_size for file in files}


def read_finished(folder: Path, job: PartJob) -> FinishedPart | None:
    """The record of a finished part.

    None if it is missing, damaged, of another input, if a file is missing, or if files that its records name have
    changed.
    """
    try:
        content = bounded.read_json(folder / DONE / f"{job.name}.json", most=MOST_BYTES)
        finished = FinishedPart(
            content["digest"],
            {name: Part.model_validate(part) for name, part in content["splits"].items()},
            tuple(Rejected(**rejected) for rejected in content["rejected"]),
            content["sizes"],
            dict(content.get("digests", {})),
            content.get("tallies", {}),
            content.get("items"),
        )
        whole = finished.digest == job.digest and _sizes(folder, finished.splits) == finished.sizes
        whole &= finished.items in (None, job.items)
    except (OSError, *bounded.BAD_CONTENT):
        return None
    return finished if whole else None


def total_tallies(folder: Path) -> dict[str, Tally]:
    """By modality, the counts of conversions in all parts of a data set."""
    found: dict[str, Tally] = {}
    for file in sorted((folder / DONE).glob("*.json")):
        try:
            tallies = bounded.read_object(file, most=MOST_BYTES).get("tallies", {})
            for name, tally in tallies.items():
                count(found.setdefault(name, {}), {str(key): float(value) for key, value in tally.items()})
        except (OSError, *bounded.BAD_CONTENT):
            continue
    return found
