"""Document files that promise more than they hold: `data prepare` takes neither the memory nor for ever."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.data.documents import jsonl, readers, webdataset
from mmscale.data.documents.readers import scan_files
from mmscale.data.documents.schema import Document, Rejected
from mmscale.errors import DataError
from tests.bounded_work import bounded_work
from tests.unit.data.samples import save_picture, text, write_jsonl

GIB = 1 << 30


def read(file: Path) -> list[Document | Rejected]:
    return [record for part in scan_files([file], slice_records=2) for record in part.read()]


@pytest.fixture(autouse=True)
def bounded_memory_and_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beyond two gigabytes more than now, allocations fail: they are promised, not needed.

    A test of many thousands of files bounds the time of each itself.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * GIB, before[1]))
    many = request.node.get_closest_marker("exhaustive") is not None
    try:
        with contextlib.nullcontext() if many else bounded_work():
            yield
    finally:  # or every later test of this process would run out of memory
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample may have 1 MiB, so that files that are larger are soon hashed."""
    monkeypatch.setattr(webdataset, "MOST_SAMPLE", 1 << 20)


def header(name: str, size: int, *, kind: bytes = tarfile.REGTYPE, form: int = tarfile.GNU_FORMAT) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(form)


def member(name: str, content: bytes, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind=kind) + content + bytes(-len(content) % 512)


def sparse(real_size: int) -> bytes:
    """A member of GNU's old sparse format: 512 bytes of data, and a claim of any size."""
    block = bytearray(header("a.txt", 512, kind=tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    block[483:495] = b"%011o\0" % real_size if real_size < 8**11 else b"\x80" + real_size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


def negative() -> bytes:
    """A member whose size is negative: an old tarfile goes back to it for ever."""
    block = bytearray(header("a.txt", 0))
    block[124:136] = b"\xff" * 10 + (-512 & 0xFFFF).to_bytes(2, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


PAIR = member("good.txt", b"words")
END = bytes(1024)


def of_size(file: Path, content: bytes, size: int) -> Path:
    """What is behind the content is a hole: it takes no room on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.truncate(size)
    return file


ARCHIVES: dict[str, tuple[bytes, int, str]] = {  # content, size of the file, what is said
    "sparse, 20 GB": (sparse(20 * GIB) + PAIR + END, 0, "a member is sparse"),
    "a hole": (header("a.txt", 20 << 20), 21 << 20, "bytes, more than"),
    "a hole for a header": (
        header("././@LongLink", 20 << 20, kind=tarfile.GNUTYPE_LONGNAME),
        21 << 20,
        "cannot be read",
    ),
    "a hole for a pax header": (header("p", 20 << 20, kind=tarfile.XHDTYPE), 21 << 20, "cannot be read"),
    "20 GB that are not there": (header("a.txt", 20 * GIB), 0, "cannot be read"),
    "a header of 20 GB": (header("n", 20 * GIB, kind=tarfile.GNUTYPE_LONGNAME), 0, "cannot be read"),
    "a pax header of 20 GB": (header("p", 20 * GIB, kind=tarfile.XHDTYPE), 0, "cannot be read"),
    "a negative size": (PAIR + negative() + END, 0, "impossible size|cannot be read"),
    "headers in headers": (member("p", b"", kind=tarfile.XHDTYPE) * 3000 + PAIR + END, 0, "cannot be read"),
    "a sparse map without end": (
        member("p", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", kind=tarfile.XHDTYPE)
        + member("a.txt", b"999999999999\n1\n"),
        0,
        "cannot be read|sparse",
    ),
    "members without end": (member("a.txt", b"") * 10_002 + END, 0, "more than 10,000 members"),
    "deep JSON": (member("a.json", b"[" * 100_000) + END, 0, "nested more than 64 deep"),
}


@pytest.mark.usefixtures("small_bound")
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str) -> None:
    content, size, said = ARCHIVES[name]
    file = of_size(tmp_path / "a.tar", content, size or len(content))
    try:
        found = "; ".join(record.reason for record in read(file) if isinstance(record, Rejected))
    except DataError as error:
        found = error.cause
    assert any(part in found for part in said.split("|")), found


def test_what_stands_behind_a_refused_sample_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(sparse(20 * GIB) + PAIR + END)
    refused, good = read(tmp_path / "a.tar")
    assert isinstance(refused, Rejected) and isinstance(good, Document) and good.id == "good"


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as made:
        for number in range(3):
            for suffix, content in (("txt", b"words"), ("json", b'{"caption": "x"}')):
                entry = tarfile.TarInfo(f"folder/{'long' * 30 * (number == 1)}{number}.{suffix}")
                entry.size = len(content)
                made.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


ARCHIVE = archive()
_EDITS = st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.binary(min_size=1, max_size=12)), max_size=6)


def read_changed(folder: Path, edits: list[tuple[int, bytes]]) -> None:
    content = bytearray(ARCHIVE)
    for at, some in edits:
        content[at : at + len(some)] = some
    for block in range(0, len(content), 512):  # checksums that fit, so that more than the first header is looked at
        if content[block + 257 : block + 262] == b"ustar":
            content[block + 148 : block + 156] = b" " * 8
            content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + 512])
    (folder / "a.tar").write_bytes(content)
    with contextlib.suppress(DataError):
        read(folder / "a.tar")


_FOLDER = [HealthCheck.function_scoped_fixture]


@settings(deadline=None, max_examples=150, suppress_health_check=_FOLDER)
@given(edits=_EDITS)
def test_changed_archives(tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    read_changed(tmp_path, edits)


@pytest.mark.exhaustive
@settings(deadline=None, max_examples=50_000, suppress_health_check=_FOLDER)
@given(edits=_EDITS)
def test_many_changed_archives(tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    with bounded_work():
        read_changed(tmp_path, edits)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in a JSONL file; the line behind it counts as its own."""
    monkeypatch.setattr(jsonl, "MOST_LINE", 1 << 20)
    file = write_jsonl(tmp_path / "a.jsonl", [{"content": [text("first")]}])
    with file.open("ab") as stream:
        stream.truncate(stream.tell() + (40 << 20))
    with file.open("ab") as stream:
        stream.write(b"\n" + b'{"content": [{"type": "text", "text": "last"}]}\n')
    first, refused, last = read(file)
    assert isinstance(first, Document) and isinstance(last, Document)
    assert isinstance(refused, Rejected) and "the line is longer than 1,048,576 bytes" in refused.reason
    assert [part.count for part in scan_files([file], slice_records=2)] == [2, 1]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("length", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_lines_about_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, end: bytes) -> None:
    monkeypatch.setattr(jsonl, "MOST_LINE", 1 << 20)
    head, tail = b'{"content": [{"type": "text", "text": "', b'"}]}'
    line = head + b"x" * (length - len(head) - len(tail) - len(end)) + tail + end
    (tmp_path / "a.jsonl").write_bytes(line + (end and line))
    found = read(tmp_path / "a.jsonl")
    assert len(found) == 1 + bool(end)
    assert all(isinstance(one, Document) for one in found) == (length < 1 << 20 or (length == 1 << 20 and end != b""))


@pytest.mark.parametrize("kind", ["lists", "objects", "text", "digits"])
def test_json_in_lines_and_columns(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    hostile = {
        "lists": "[" * 100_000,
        "objects": '{"a":' * 60_000,
        "text": '"' * 100_001,
        "digits": '{"content": ' + "9" * 100_000 + "}",
    }[kind]
    (record,) = read(write_jsonl(tmp_path / "a.jsonl", [hostile]))
    assert isinstance(record, Rejected) and "broken JSON" in record.reason
    pq.write_table(pa.table({"content": [hostile], "loss": [hostile]}), tmp_path / "a.parquet")
    (record,) = read(tmp_path / "a.parquet")
    assert isinstance(record, Rejected)


def test_a_parquet_file_with_more_rows_than_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = 4_000_000
    pq.write_table(pa.table({"content": pa.nulls(rows, pa.string())}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < rows // 8
    with pytest.raises(DataError, match=r"says that it has 4,000,000 rows, in [0-9,]+ bytes"):
        read(tmp_path / "a.parquet")


def test_the_bounds_do_not_change_what_is_read(tmp_path: Path) -> None:
    """Files of every kind, the same documents."""
    save_picture(tmp_path / "1.png", 1)
    (tmp_path / "a.tar").write_bytes(ARCHIVE)
    documents = [one for one in read(tmp_path / "a.tar") if isinstance(one, Document)]
    assert len(documents) == 3 and all(one.content for one in documents)


Make = Callable[[Path], None]


def _pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("make", [_pipe, Path.mkdir], ids=["a pipe", "a folder"])
@pytest.mark.parametrize("suffix", ["jsonl", "tar"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: Make, suffix: str) -> None:
    make(tmp_path / f"a.{suffix}")
    with pytest.raises(DataError, match="there is no document file"):
        readers.list_files([str(tmp_path / f"a.{suffix}")])
