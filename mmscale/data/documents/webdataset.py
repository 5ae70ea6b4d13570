"""WebDataset tar: neighbouring members with the same name up to the first dot are a document.

When an archive is cut into runs, it is read up to its closing blocks, because tarfile treats a damaged header in the
middle as the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mmscale import bounded
from mmscale.data.documents import energon
from mmscale.data.documents.document_files import File
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import (
    CONTENT_KEYS,
    SUFFIXES,
    Document,
    Rejected,
    Resolver,
    SplitName,
    parse_document,
)
from mmscale.data.documents.slices import Format, ReadSettings, RecordRun, Scan, digest_of

# Bounds on one sample, because headers may claim anything: a sparse archive of 2 kB can have members of 20 GB.
MOST_SAMPLE = 256 << 20  # bytes of all members
MOST_MEMBERS = 10_000
MOST_BAD = 0.1  # an archive with a larger share of incomplete or repeated samples is refused
_OF_A_PAIR = ("id", "loss", "group", "split")  # keys of a pair's .json that are read besides its caption
_CAPTION_KEYS = ("caption", "text")  # of a pair's .json
CODES = "npy"  # suffix of a picture's codes
_CODES_OF = "image"
_READ = {*SUFFIXES, CODES, "json"}
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ArchiveFacts:
    """Data about the archive that every run of its records needs.

    Attributes:
        repeated: keys of the run that occur in several places of the archive.
        pairs: whether the archive has samples with a caption and an item.
        split: of samples that name none.
        notes: for the user.
    """

    repeated: tuple[str, ...] = ()
    pairs: bool = False
    split: SplitName | None = None
    notes: tuple[str, ...] = ()


def _key(name: str) -> str:
    """The name up to the first dot of the file name (WebDataset's rule)."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".", 1)[0])


def _field(name: str) -> str:
    """The part of the file name after the first dot, lower case."""
    return PurePosixPath(name).name.partition(".")[2].lower()


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbouring regular members with the same key."""
    key, members, end = "", list[tarfile.TarInfo](), -1
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it saw
        if member.size < 0 or member.offset <= end:  # such a member would be read in an endless loop
            raise tarfile.ReadError(f"{member.name} has an impossible size")
        end = member.offset
        if not member.isreg():  # links and devices are never followed
            continue
        name = _key(member.name)
        if members and name != key:
            yield key, members
            members = []
        key = name
        if len(members) <= MOST_MEMBERS:
            members.append(member)
    if members:
        yield key, members


class _Stream(io.BufferedReader):
    """A file from which at most the size of a sample is read at once, because headers may claim anything."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_SAMPLE:
            raise tarfile.ReadError(f"a header or a member of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def _open_tar(file: File, *, offset: int = 0) -> Iterator[tarfile.TarFile]:
    """An archive, read from an offset on.

    Raises:
        tarfile.TarError: for any damage. tarfile itself raises almost anything on damaged headers.
    """
    try:
        with _Stream(_raw(file)) as stream:
            stream.seek(offset)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                yield archive
    except (EOFError, MemoryError, *bounded.BAD_CONTENT) as error:
        raise tarfile.ReadError(f"it is damaged ({type(error).__name__}: {error})") from error


def _raw(file: File) -> Any:
    return io.FileIO(file) if isinstance(file, Path) else file.open()


def _scan(file: File, slice_records: int, settings: ReadSettings) -> Scan:
    runs, total, kinds, unread = list[RecordRun](), 0, Counter[str](), Counter[str]()
    seen, repeated = set[bytes](), dict[str, list[int]]()
    with _open_tar(file) as archive:
        for key, members in _samples(archive):
            if total % slice_records == 0:
                runs.append(RecordRun(file, total, 0, members[0].offset, settings))
            short = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            if short in seen:
                repeated.setdefault(key, [])
            seen.add(short)
            kinds[kind := _kind(archive, members, settings)] += 1
            if kind != "document" and len(unread) < MOST_MEMBERS:  # the .json of a document may refer to any member
                unread.update({_field(member.name) for member in members} - _READ - set(settings.captions))
            total += 1
        _check_end(archive)
    if len(repeated) > MOST_BAD * len(seen):
        raise tarfile.ReadError(
            f"members of {len(repeated):,} of {len(seen):,} samples are not next to each other; sort it by name"
        )
    halves = kinds["caption"] + kinds["item"]
    if kinds["pair"] and settings.half_pairs == "reject" and halves > MOST_BAD * total:
        raise tarfile.ReadError(
            f"{kinds['item']:,} of {total:,} samples have no caption and {kinds['caption']:,} have nothing else, "
            f"though {kinds['pair']:,} are pairs; captions end in {', '.join(settings.captions)} "
            "(data.prepare.captions), and data.prepare.half_pairs=keep reads half pairs"
        )
    known = energon.facts_of(file)
    if known is not None and known[0] != total:
        raise tarfile.ReadError(f"it has {total:,} samples, and energon's index says {known[0]:,}")
    facts = ArchiveFacts(tuple(repeated), bool(kinds["pair"]), known[1] if known else None, _notes(unread, total))
    counts = [min(slice_records, total - run.first) for run in runs]
    return Scan(
        digest_of(file), [replace(run, count=count, facts=facts) for run, count in zip(runs, counts, strict=True)]
    )


def _kind(archive: tarfile.TarFile, members: Sequence[tarfile.TarInfo], settings: ReadSettings) -> str:
    """The kind of a sample: pair, caption, item, document (its .json has `content`) or other.

    If the names of members do not decide, the .json is read: it may have the caption, or be a document.
    """
    fields = {_field(member.name) for member in members}
    caption, item = bool(fields & set(settings.captions)), bool(fields & {*SUFFIXES, CODES})
    if "json" in fields and not (caption and item):
        record = _record_of(archive, next(member for member in members if _field(member.name) == "json"))
        if record is None or "content" in record:
            return "other" if record is None else "document"
        caption = caption or bool(_described(record))
    return "pair" if caption and item else "caption" if caption else "item" if item else "other"


def _notes(unread: Mapping[str, int], total: int) -> tuple[str, ...]:
    """Remarks about members that no document uses, if most samples have them."""
    found = sorted(field for field, count in unread.items() if 2 * count > total)
    if not found:
        return ()
    names = ", ".join(f"KEY.{field}"[:80] for field in found[:5])
    return (f"note: members {names} of most samples are not read. Captions: data.prepare.captions=[{found[0][:80]}]",)


def _record_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Mapping[str, Any] | None:
    """The content of a .json; None: it is not an object, and the sample is rejected when it is read."""
    if member.issparse() or member.size > MOST_SAMPLE:
        return None
    opened = archive.extractfile(member)
    assert opened is not None  # regular members only
    try:
        record = bounded.parse_json(opened.read())
    except ValueError:
        return None
    return record if isinstance(record, Mapping) else None


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive that does not end with the closing blocks, or that has data after them.

    Raises:
        tarfile.ReadError: it is damaged, truncated, or followed by another one.
    """
    stream: Any = archive.fileobj
    size = stream.seek(0, io.SEEK_END)
    stream.seek(archive.offset)
    closing = stream.read(2 * _BLOCK)
    if closing.strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged at byte {archive.offset:,} of {size:,}")
    if len(closing) < 2 * _BLOCK:
        raise tarfile.ReadError(f"it is cut off at byte {size:,}: the closing blocks are missing")
    while chunk := stream.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(
                f"something follows its end at byte {archive.offset:,} of {size:,}; join archives with `tar -A`"
            )


def _read(part: RecordRun) -> Iterator[Document | Rejected]:
    with _open_tar(part.path, offset=part.offset) as archive:
        for number, (key, members) in enumerate(_samples(archive)):
            if number == part.count:
                return
            where = f"{part.path.name}:{key}"
            if reason := _refused(key, members, part.facts):
                yield Rejected(where, _printable(key), reason)
                continue
            files = {}
            for member in members:
                opened = archive.extractfile(member)
                assert opened is not None  # regular members only
                files[PurePosixPath(member.name).name.partition(".")[2]] = opened.read()
            yield _parse_sample(key, files, where, part)


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _refused(key: str, members: Sequence[tarfile.TarInfo], facts: ArchiveFacts) -> str:
    """Why a sample is not used; "" if it is."""
    if key in facts.repeated:
        return "its members are not next to each other in the archive, or its key appears twice"
    if any(member.issparse() for member in members):
        return "a member is sparse: it may claim any size"
    total = sum(member.size for member in members)
    if total > MOST_SAMPLE:
        return f"the sample has {total:,} bytes, more than {MOST_SAMPLE:,}"
    if len(members) > MOST_MEMBERS:
        return f"the sample has more than {MOST_MEMBERS:,} members"
    names = Counter(PurePosixPath(member.name).name for member in members)
    twice = [name for name, count in names.items() if count > 1]
    return f"{twice[0]} is there twice" if twice else ""


def _parse_sample(key: str, files: Mapping[str, bytes], where: str, part: RecordRun) -> Document | Rejected:
    """A sample whose .json has `content` or messages is a document; otherwise its text and its image are a pair."""
    record: Any = {}
    described = next((data for name, data in files.items() if name.lower() == "json"), None)
    try:
        if described is not None:
            record = bounded.parse_json(described)
        if not isinstance(record, Mapping) or not record.keys() & set(CONTENT_KEYS):
            record = _pair(key, files, record if isinstance(record, Mapping) else {}, part)
    except ValueError as error:
        reason = "broken JSON: " + ("not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error))
        return Rejected(where, _printable(key), reason)
    except BadDocumentError as error:
        return Rejected(where, _printable(key), str(error))
    ignore = part.settings.ignore
    if part.facts.split is not None and isinstance(record, Mapping) and record.get("split") is None:
        record = {**record, "split": part.facts.split}
    return parse_document(record, where=where, fallback_id=key, resolve=_sample_resolver(key, files), ignore=ignore)


def _pair(key: str, files: Mapping[str, bytes], record: Mapping[str, Any], part: RecordRun) -> Mapping[str, Any]:
    """A document with caption and image.

    By a hash of the key, half of the pairs have the image first, half the caption.

    The .json of a pair may have further keys about the picture, which are not read.

    Raises:
        BadDocumentError: the pair is incomplete although other samples are pairs, or its caption is not text.
    """
    caption = _caption(files, record, part.settings)
    items: list[dict[str, Any]] = [
        {"type": SUFFIXES[name.lower()], "path": name} for name in files if name.lower() in SUFFIXES
    ]
    if not items:  # next to a picture it may be anything, for instance an embedding
        items = [{"type": "tokens", "modality": _CODES_OF, "path": name} for name in files if name.lower() == CODES]
    if part.facts.pairs and part.settings.half_pairs == "reject" and not (caption and items):
        missing = "a picture or another item" if caption else "a caption"
        dotted = [name for name in files if "." in name and name.lower() not in part.settings.captions]
        dots = f"; what is before the first dot of {dotted[0]!r} is taken for its key" if dotted else ""
        raise BadDocumentError(f"the sample has no {missing.removeprefix('a ')}, and others have one{dots}")
    content: list[dict[str, Any]] = [{"type": "text", "text": caption}, *items]
    if hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[0] % 2:
        content.reverse()
    return {"id": key, "content": content} | {name: record[name] for name in _OF_A_PAIR if name in record}


def _caption(files: Mapping[str, bytes], record: Mapping[str, Any], settings: ReadSettings) -> Any:
    """The caption of a pair: a member, or in the .json; "" if there is none."""
    lower = {name.lower(): data for name, data in files.items()}
    found = next((lower[suffix] for suffix in settings.captions if suffix in lower), None)
    if found is None:
        return _described(record)
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocumentError("the caption is not UTF-8") from error


def _described(record: Mapping[str, Any]) -> Any:
    """The caption in the .json of a pair; "" if there is none."""
    return next((record[name] for name in _CAPTION_KEYS if name in record), "")


def _sample_resolver(key: str, files: Mapping[str, bytes]) -> Resolver:
    """Image paths name a member of the same sample: "png", "a1.png" or "folder/a1.png"."""
    path = PurePosixPath(key)

    def resolve(name: str) -> bytes:
        for prefix in ("", f"{path.name}.", f"{path}."):
            if name.startswith(prefix) and name[len(prefix) :] in files:
                return files[name[len(prefix) :]]
        raise BadDocumentError(f"image {name} is missing from sample {key} of the archive")

    return resolve


WEBDATASET = Format(_scan, _read)
