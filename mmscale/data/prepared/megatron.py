"""Megatron corpora (`.bin`/`.idx` of `tools/preprocess_data.py`) as a data set, without a copy of their tokens.

The data set has its own index and table, and links to the .bin files. A constant is added to ids when they are read. A
document longer than `max_document_tokens` becomes several consecutive ones in the same file. Text only. Every id is
checked once. No torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config import PrepareConfig
from mmscale.data import digests
from mmscale.data.arrays import GOLDEN, finalized
from mmscale.data.digests import Hasher
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.modalities.model_vocabulary import ids_of
from mmscale.data.modalities.text_tokens import TextTokenizer, read_content
from mmscale.data.prepared.manifest import MANIFEST, Part
from mmscale.data.prepared.parts import DTYPES, HEADER, index_bytes
from mmscale.data.progress import Reporter
from mmscale.data.vocab import EOS, PAD, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import ConfigError, DataError
from mmscale.runtime.atomic_files import publish, temporary_for, write_atomic

DOCUMENTS = 1 << 20  # documents of a part, before long ones are cut
_HEAD = struct.Struct("<QBQQ")  # version, code of the type, sequences, documents + 1
_VERSION = 1
_FLOATS = (6, 7)  # codes of floating-point types, which cannot be ids
_CHUNK = 16 << 20  # ids checked at a time


@dataclass(frozen=True, eq=False)
class MegatronCorpus:
    """One pair of files.

    Attributes:
        idx, bin: the files.
        dtype: of the ids.
        lengths: tokens of each sequence, int32 [sequences], mapped.
        pointers: where each sequence begins in the .bin file [bytes], int64 [sequences], mapped.
        bounds: first sequence of each document, and the number of sequences, int64 [documents + 1], mapped.
        digest: SHA-256 of the index.
    """

    idx: Path
    bin: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    bounds: NDArray[np.int64]
    digest: str

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.bounds) - 1

    @property
    def changed(self) -> int:
        """When the token file was last written, replaced or moved [ns]."""
        state = self.bin.stat()
        return max(state.st_mtime_ns, state.st_ctime_ns)

    @property
    def identity(self) -> str:
        """Changes with the index and the size of the token file; `check_tokens` compares the tokens."""
        return f"{self.idx.name}:{self.digest}:{self.bin.stat().st_size}"


def open_corpus(idx: Path) -> MegatronCorpus:
    """Read and check an index, and compare it with its .bin file.

    Raises:
        DataError: it is damaged, of another version, multimodal, or its numbers are not ids.
    """
    tokens = idx.with_suffix(".bin")
    try:
        size, total = idx.stat().st_size, tokens.stat().st_size
        with idx.open("rb") as stream:
            head = stream.read(len(HEADER) + _HEAD.size)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"megatron: {error.filename} cannot be read: {error.strerror}", remedy="name .idx files with a .bin beside"
        ) from error
    if not head.startswith(HEADER) or len(head) < len(HEADER) + _HEAD.size:
        raise _refused(idx, "is no index of a Megatron corpus")
    version, code, sequences, bounds = _HEAD.unpack_from(head, len(HEADER))
    if version != _VERSION:
        raise _refused(idx, f"has version {version} of the format, {_VERSION} is read")
    if code not in DTYPES:
        what = "floating-point numbers, which are no ids" if code in _FLOATS else f"numbers of an unknown type ({code})"
        raise _refused(idx, f"is of {what}")
    expected = len(head) + 12 * sequences + 8 * bounds
    if size == expected + sequences:
        raise _refused(
            idx, "is multimodal (it has a mode for each sequence)", "prepare the documents it was made from instead"
        )
    if total % DTYPES[code].itemsize:
        raise _refused(idx, f"is of {DTYPES[code]}, and {tokens.name} has {total:,} bytes")
    if size != expected or bounds < 1:
        raise _refused(idx, f"has {size:,} bytes, and its header says {expected:,}")
    corpus = MegatronCorpus(
        idx,
        tokens,
        DTYPES[code],
        _mapped(idx, np.int32, sequences, len(head)),
        _mapped(idx, np.int64, sequences, len(head) + 4 * sequences),
        _mapped(idx, np.int64, bounds, len(head) + 12 * sequences),
        digest,
    )
    if corpus.bounds[0] != 0 or corpus.bounds[-1] != sequences or (np.diff(corpus.bounds) < 0).any():
        raise _refused(idx, "has documents that do not cover its sequences")
    if sequences and int(corpus.pointers[-1]) + int(corpus.lengths[-1]) * corpus.dtype.itemsize > total:
        raise _refused(idx, f"points behind the end of {tokens.name}, which has {total:,} bytes")
    return corpus


def _mapped(file: Path, dtype: Any, count: int, offset: int) -> NDArray[Any]:
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,)) if count else np.zeros(0, dtype)


def _refused(idx: Path, why: str, remedy: str = "copy the corpus again, or leave it out") -> DataError:
    return DataError(f"megatron: {idx} {why}", remedy=remedy)


def check_tokenizer_named(settings: PrepareConfig) -> None:
    """Refuse corpora if the settings do not name their tokenizer.

    Raises:
        ConfigError: none is named.
    """
    if settings.text.load is None:
        raise ConfigError(
            "data.prepare: a Megatron corpus needs its tokenizer: data.prepare.text.load is not set",
            remedy="name the tokenizer.json that the corpus was made with",
        )


def offset_of(settings: PrepareConfig, tokenizer: TextTokenizer) -> int:
    """The number to add to the ids of corpora: by how much loading the tokenizer's file moved up its ids."""
    if settings.id_offset is not None:
        return settings.id_offset
    assert settings.text.load is not None
    own = ids_of(read_content(Path(settings.text.load))["model"])
    word, number = max(((word, number) for word, number in own.items() if word not in SPECIAL_TOKENS), key=_number)
    moved = tokenizer.tokenizer.token_to_id(word)
    assert moved is not None, "loading renames special tokens only, and they do not have the largest id"
    return int(moved) - number


def _number(entry: tuple[str, int]) -> int:
    return entry[1]


def link(
    out: Path,
    corpora: Sequence[MegatronCorpus],
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    offset: int,
    reporter: Reporter,
) -> tuple[dict[str, list[Part]], dict[str, str]]:
    """Create index, table and link of every part.

    Args:
        out: the data set's folder, which is locked.
        corpora: in the order in which they were named.
        settings: `max_document_tokens` and `held_out`.
        vocabulary: ids must be in its first range.
        offset: added to ids.
        reporter: receives the progress.

    Returns:
        Parts by split, and digests by file.

    Raises:
        DataError: an id is outside of the text range or padding, or sequences of a document are not contiguous.
    """
    splits: dict[str, list[Part]] = {TRAIN: [], VALIDATION: []}
    known: dict[str, str] = {}
    for number, corpus in enumerate(corpora):
        with reporter.part(f"{corpus.bin.name}: checking ids") as on_progress:
            whole = _checked_ids(corpus, vocabulary, offset, on_progress)
        for block, first in enumerate(range(0, corpus.documents, DOCUMENTS)):
            starts, lengths, held = _pieces(corpus, first, number, settings)
            for split, chosen in ((TRAIN, ~held), (VALIDATION, held)):
                if not chosen.any():
                    continue
                prefix = f"{split}/{number:03d}-{block:05d}"
                part, own = _write(out, prefix, corpus, starts[chosen], lengths[chosen], vocabulary, offset)
                splits[split].append(part)
                known |= own | {f"{prefix}.bin": whole}
    return splits, known


def _checked_ids(corpus: MegatronCorpus, vocabulary: Vocabulary, offset: int, on_progress: Any) -> str:
    """Digest of the tokens, after checking that every id is text: no padding, no begin or end token of an item."""
    low, high = vocabulary.ranges[0]
    ids = (
        np.memmap(corpus.bin, dtype=corpus.dtype, mode="r") if corpus.bin.stat().st_size else np.zeros(0, corpus.dtype)
    )
    hasher = Hasher()
    for at in range(0, len(ids), _CHUNK):
        some = ids[at : at + _CHUNK]
        least, most = int(some.min()) + offset, int(some.max()) + offset
        if least <= max(low, PAD) or most >= high:
            wrong = least if least <= max(low, PAD) else most
            raise DataError(
                f"megatron: {corpus.bin} has id {wrong - offset}, which is {wrong} in a text range of {low + 1} to "
                f"{high - 1}",
                remedy="correct data.prepare.id_offset, or give text as many ids in vocab.modalities as the corpus has",
            )
        if least < len(vocabulary.specials):
            moved = np.unique(some[some <= len(vocabulary.specials) - offset]).astype(np.int64) + offset
            marks = [number for number in moved.tolist() if EOS < number < len(vocabulary.specials)]
            if marks:
                raise DataError(
                    f"megatron: {corpus.bin} has id {marks[0] - offset}, which is {marks[0]}, the special token "
                    f"{vocabulary.specials[marks[0]]} of items, and not text",
                    remedy="correct data.prepare.id_offset, or prepare the documents that the corpus was made from",
                )
        hasher.update(some.tobytes())
        on_progress(f"{at:,} of {len(ids):,}")
    return hasher.hexdigest()


def _pieces(
    corpus: MegatronCorpus, first: int, number: int, settings: PrepareConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Pieces of a block of documents: where they start, their lengths, and whether they are held out."""
    bounds = np.asarray(corpus.bounds[first : first + DOCUMENTS + 1])
    sizes = np.asarray(corpus.lengths[bounds[0] : bounds[-1]], dtype=np.int64)
    pointers = np.asarray(corpus.pointers[bounds[0] : bounds[-1]]) // corpus.dtype.itemsize
    if len(sizes) > 1 and (pointers[:-1] + sizes[:-1] != pointers[1:]).any():
        raise _refused(corpus.idx, "has sequences that do not follow one another")
    ends = np.concatenate([[0], sizes.cumsum()])
    lengths = ends[bounds[1:] - bounds[0]] - ends[bounds[:-1] - bounds[0]]
    starts = (pointers[0] if len(pointers) else 0) + ends[bounds[:-1] - bounds[0]]
    # All pieces of a document must be in the same split, so the number of the document decides.
    held = _fractions(np.arange(first, first + len(lengths), dtype=np.uint64), number) < settings.held_out
    most = settings.max_document_tokens
    pieces = -(-lengths // most)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    inside = np.arange(len(owner)) - np.repeat(pieces.cumsum() - pieces, pieces)
    begins = starts[owner] + inside * most
    return begins, np.minimum(most, lengths[owner] - inside * most), held[owner]


def _fractions(numbers: NDArray[np.uint64], stream: int) -> NDArray[np.float64]:
    """A random fraction from 0 to 1 for each document: splitmix64 of the document's number."""
    states = (numbers + np.uint64(stream) * np.uint64(1 << 40) + np.uint64(1)) * GOLDEN
    fractions: NDArray[np.float64] = finalized(states).astype(np.float64) / 2.0**64
    return fractions


def _write(
    out: Path,
    prefix: str,
    corpus: MegatronCorpus,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    vocabulary: Vocabulary,
    offset: int,
) -> tuple[Part, dict[str, str]]:
    names = vocabulary.names
    table = np.zeros((len(lengths), len(names) + 1), np.int64)
    table[:, 0], table[:, -1] = lengths, (1 << len(names)) - 1
    meta = io.BytesIO()
    np.save(meta, table)
    index = index_bytes(lengths, corpus.dtype, starts=starts)
    known = {}
    (out / prefix).parent.mkdir(exist_ok=True)
    for suffix, content in ((".idx", index), (".meta.npy", meta.getvalue())):
        write_atomic(out / f"{prefix}{suffix}", content)
        hasher = Hasher()
        hasher.update(content)
        known[f"{prefix}{suffix}"] = hasher.hexdigest()
    temporary = temporary_for(out / f"{prefix}.bin")
    temporary.symlink_to(corpus.bin.resolve())
    publish([(temporary, out / f"{prefix}.bin")])
    part = Part(
        prefix=prefix,
        documents=len(lengths),
        tokens={name: int(lengths.sum()) if name == names[0] else 0 for name in names},
        bin_bytes=corpus.bin.stat().st_size,
        idx_bytes=len(index),
        text_labels=int((lengths - 1).sum()),
        id_offset=offset,
    )
    return part, known


def check_tokens(out: Path, corpora: Sequence[MegatronCorpus], reporter: Reporter) -> None:
    """Refuse a prepared data set if the tokens of its corpora have changed. Untouched files are not read.

    Raises:
        DataError: a corpus has other tokens, of the same number.
    """
    made, known = (out / MANIFEST).stat().st_mtime_ns, digests.read(out) or {}
    for number, corpus in enumerate(corpora):
        wanted = {known[name] for name in known if re.match(rf"[a-z]+/{number:03d}-\d+\.bin$", name)}
        if corpus.changed < made or not wanted:
            continue
        with reporter.part(f"{corpus.bin.name}: it was touched, comparing its tokens"):
            same = wanted == {digests.digest_of(corpus.bin)}
        if not same:
            raise DataError(
                f"data: {out} was prepared from other tokens than {corpus.bin} has now",
                remedy="bring the former file back, choose another --out, or give --overwrite",
            )


def content_of(known: Mapping[str, str]) -> str:
    """Digest of the tokens of all corpora.

    Args:
        known: digests by file, from `link`.
    """
    tokens = sorted((name, digest) for name, digest in known.items() if name.endswith(".bin"))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def identities(corpora: Sequence[MegatronCorpus]) -> str:
    """Digest of the corpora that a data set is linked to."""
    return hashlib.sha256(json.dumps([corpus.identity for corpus in corpora]).encode()).hexdigest()


def corpora_of(files: Sequence[Path]) -> Iterator[MegatronCorpus]:
    """The corpora of these index files.

    Raises:
        DataError: a file is not an index.
    """
    for file in files:
        if file.suffix != ".idx":
            raise DataError(f"megatron: {file} is no .idx file", remedy="name the .idx files of the corpora")
        yield open_corpus(file)
