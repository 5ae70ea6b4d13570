# mmscale/data/documents/{jsonl,parquet,webdataset,readers,plugin_reader}.py: damaged and odd files are read right, or
# refused with a reason; never cut short in silence.
"""Tests of what readers do with files that are not quite what they should be."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmscale.data.documents import parquet as parquet_reader
from mmscale.data.documents.readers import scan_files
from mmscale.data.documents.schema import Document, Rejected, Text
from mmscale.data.documents.slices import ReadSettings
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
from tests.unit.data.samples import config, image, picture, save_picture, text, write_jsonl

Members = Sequence[tuple[str, bytes]]


def read(file: Path, *, slice_records: int = 3, **settings: Any) -> list[Document | Rejected]:
    parts = scan_files([file], slice_records=slice_records, settings=ReadSettings(**settings))
    return [record for part in parts for record in part.read()]


def reasons(records: Sequence[Document | Rejected]) -> dict[str, str]:
    return {record.id: record.reason for record in records if isinstance(record, Rejected)}


def png() -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture(1)[..., 0]).save(stream, format="PNG")
    return stream.getvalue()


PNG = png()


def tar(file: Path, members: Members) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def pairs(count: int, caption: str = "txt") -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        members += [(f"{number:03d}.png", PNG), (f"{number:03d}.{caption}", b"words")]
    return members


# ------------------------------------------------------------------------------------------------- damaged archives


def flip_a_header(content: bytearray) -> bytearray:
    at = content.index(b"010.png")
    content[at] ^= 1
    return content


DAMAGE: dict[str, tuple[Callable[[bytearray], bytes | bytearray], str]] = {
    "a flipped bit of a header": (flip_a_header, "it is damaged at byte"),
    "a zeroed header": (
        lambda content: content[: content.index(b"010.png")] + bytes(512) + content[content.index(b"010.png") + 512 :],
        "it is damaged|something follows",
    ),
    "cut between members": (lambda content: content[: content.index(b"010.png")], "the closing blocks are missing"),
    "cut in a header": (lambda content: content[: content.index(b"010.png") + 200], "damaged|cut off"),
    "cut in a member": (lambda content: content[: content.index(b"010.png") + 520], "cannot be read"),
    "one closing block": (
        lambda content: content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512 + 512),
        "the closing blocks are missing",
    ),
    "another archive behind it": (lambda content: content + content, "something follows its end"),
    "something else behind it": (lambda content: content + b"x", "something follows its end"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_archive_is_read_to_its_end_or_refused(tmp_path: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    file = tar(tmp_path / "a.tar", pairs(40))
    assert len(read(file)) == 40
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with pytest.raises(DataError, match=said):
        read(file)


# ------------------------------------------------------------------------------------------------- samples and pairs


def test_members_that_are_not_next_to_each_other(tmp_path: Path) -> None:
    members = pairs(20)
    apart = [*(one for one in members if one[0] != "003.txt"), ("003.txt", b"words")]
    found = read(tar(tmp_path / "a.tar", apart), half_pairs="keep")
    assert len(found) == 21 and set(reasons(found)) == {"003"}
    assert "not next to each other" in reasons(found)["003"]
    by_kind = sorted(members, key=lambda member: member[0][-3:])
    with pytest.raises(DataError, match=r"20 of 20 samples are not next to each other; sort it by name"):
        read(tar(tmp_path / "b.tar", by_kind), half_pairs="keep")
    twice = read(tar(tmp_path / "c.tar", [*members, members[0]]), half_pairs="keep")
    assert "000" in reasons(twice)


@pytest.mark.parametrize("lost", ["txt", "png"])
def test_half_pairs(tmp_path: Path, lost: str) -> None:
    one = [member for member in pairs(20) if member[0] != f"007.{lost}"]
    found = read(tar(tmp_path / "a.tar", one))
    assert len(found) == 20 and set(reasons(found)) == {"007"}
    assert ("no caption" if lost == "txt" else "no picture") in reasons(found)["007"]
    assert not reasons(read(tmp_path / "a.tar", half_pairs="keep"))
    some = [member for member in pairs(20) if not (member[0].endswith(lost) and member[0] < "003")]
    with pytest.raises(DataError, match=r"3 of 20 samples have no caption|3 have nothing else"):
        read(tar(tmp_path / "b.tar", some))
    assert len(read(tmp_path / "b.tar", half_pairs="keep")) == 20
    only = [member for member in pairs(20) if not member[0].endswith(lost)]
    assert not reasons(read(tar(tmp_path / "c.tar", only)))  # an archive of texts, or of pictures


@pytest.mark.parametrize("caption_in", ["txt", "json"])
@pytest.mark.parametrize("lost", ["caption", "png"])
def test_half_pairs_beside_a_json(tmp_path: Path, lost: str, caption_in: str) -> None:
    """As img2dataset writes archives: a picture, its caption, and a .json of facts, which may have the caption too."""

    def archive(name: str, halves: int) -> Path:
        members = []
        for key in (f"{number:03d}" for number in range(20)):
            half = key < f"{halves:03d}"
            facts = {"url": "x", "width": 4}
            if not (half and lost == "png"):
                members.append((f"{key}.png", PNG))
            if not (half and lost == "caption"):
                if caption_in == "json":
                    facts["caption"] = "words"
                else:
                    members.append((f"{key}.txt", b"words"))
            members.append((f"{key}.json", json.dumps(facts).encode()))
        return tar(tmp_path / name, members)

    found = read(archive("a.tar", 1))
    assert len(found) == 20 and set(reasons(found)) == {"000"}
    assert ("no caption" if lost == "caption" else "no picture") in reasons(found)["000"]
    assert not reasons(read(tmp_path / "a.tar", half_pairs="keep"))
    with pytest.raises(DataError, match=r"3 of 20 samples have no caption|3 have nothing else"):
        read(archive("b.tar", 3))
    assert len(read(tmp_path / "b.tar", half_pairs="keep")) == 20
    if lost == "caption":  # samples of a .json without picture and caption are empty in any archive
        assert not reasons(read(archive("c.tar", 20)))


def test_documents_in_json_are_no_half_pairs(tmp_path: Path) -> None:
    members = pairs(3)
    for number in range(20):
        content = {"content": [text("words")] if number % 2 else [image("png")]}
        members += [(f"d{number:02d}.json", json.dumps(content).encode())]
        members += [] if number % 2 else [(f"d{number:02d}.png", PNG)]
    found = read(tar(tmp_path / "a.tar", members))
    assert len(found) == 23 and not reasons(found)


@pytest.mark.parametrize("caption", ["TXT", "text", "caption.txt", "Caption"])
def test_suffixes_of_captions(tmp_path: Path, caption: str) -> None:
    found = read(tar(tmp_path / "a.tar", pairs(3, caption)))
    assert [len(one.content) for one in found if isinstance(one, Document)] == [2, 2, 2]
    assert all(Text("words") in one.content for one in found if isinstance(one, Document))
    mine = tar(tmp_path / "b.tar", pairs(3, "words"))
    assert all(len(one.content) == 1 for one in read(mine) if isinstance(one, Document))
    assert all(len(one.content) == 2 for one in read(mine, captions=("words",)) if isinstance(one, Document))


def test_members_that_nobody_reads_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(tmp_path / "a.tar", pairs(20, "words"))
    tar(tmp_path / "b.tar", [*pairs(20), ("003.seg", b"x")])
    prepare(config(documents=[str(tmp_path / "[ab].tar")], half_pairs="keep"), tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if "are not read" in line]
    assert said == ["note: members KEY.words of most samples are not read. Captions: data.prepare.captions=[words]"]
    members = [(f"{n}.json", json.dumps({"content": [image("a.bin")]}).encode()) for n in range(3)]
    (part,) = scan_files([tar(tmp_path / "c.tar", [*members, ("2.a.bin", PNG)])], slice_records=9)
    assert part.notes == ()


@pytest.mark.parametrize("key", ["caption", "text"])
def test_captions_in_json(tmp_path: Path, key: str) -> None:
    members = [("a.png", PNG), ("a.json", json.dumps({key: "words", "width": 4}).encode())]
    (found,) = read(tar(tmp_path / "a.tar", members))
    assert isinstance(found, Document) and Text("words") in found.content and found.images


def test_odd_samples(tmp_path: Path) -> None:
    members = [*pairs(30), ("b.png", PNG), ("b.txt", b"\xff"), ("c.txt", b"\xef\xbb\xbfmark"), ("c.png", PNG)]
    members += [("my.cat.png", PNG), ("my.cat.txt", b"cat"), ("e.png", PNG), ("e.png", PNG), ("e.txt", b"x")]
    found = read(tar(tmp_path / "a.tar", members))
    said = reasons(found)
    assert said.keys() == {"b", "my", "e"}
    assert said["b"] == "the caption is not UTF-8"
    assert "what is before the first dot of 'cat.png' is taken for its key" in said["my"]
    assert said["e"] == "e.png is there twice"
    (mark,) = (one for one in found if one.id == "c")
    assert isinstance(mark, Document) and Text("mark") in mark.content


# ------------------------------------------------------------------------------------------------- one bad record


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a" * 300 + ".png", "cannot be found"),
        ("b/" * 3000 + "a.png", "cannot be found|missing"),
        ("\\ud800.png", "half of a surrogate pair"),
        ("data:image/png;base64," + "A" * 5000, "data URI"),
        ("a\\u0000b", "NUL"),
    ],
    ids=["a long name", "a long path", "a surrogate", "a data URI", "a NUL"],
)
def test_one_bad_path_rejects_one_document(tmp_path: Path, path: str, said: str) -> None:
    save_picture(tmp_path / "1.png", 1)
    bad = '{"id": "bad", "content": [{"type": "image", "path": "' + path + '"}]}'
    good = {"id": "good", "content": [image("1.png")]}
    found = read(write_jsonl(tmp_path / "a.jsonl", [bad, good]))
    assert [type(one) for one in found] == [Rejected, Document]
    reason = reasons(found)["bad"]
    assert any(one in reason for one in said.split("|")) and len(reason) < 1000


def test_one_text_of_a_column_that_is_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [json.dumps([text(f"row {n}")]).encode() for n in range(5)]
    rows[2] = b'[{"type": "text", "text": "\xff"}]'
    content = pa.array(rows, pa.binary()).cast(pa.large_binary())
    offsets = content.buffers()
    strings = pa.Array.from_buffers(pa.large_string(), len(content), offsets)
    pq.write_table(pa.table({"content": strings, "id": pa.array([0.0, 1.0, 2.0, None, 4.0])}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", slice_records=2)
    assert [one.id for one in found] == ["0", "1", "a.parquet:2", "a.parquet:3", "4"]
    assert reasons(found) == {"a.parquet:2": "a text is not UTF-8"}


@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_of_a_group_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool) -> None:
    """2,000 rows in two row groups, in 100 slices: each group is decoded from its start once."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    names = pa.array([f"r{n % 7}" for n in range(2000)])
    column = names.dictionary_encode() if dictionary else names
    table = pa.table({"content": [[text(str(n))] for n in range(2000)], "group": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1500)
    slices = scan_files([tmp_path / "a.parquet"], slice_records=20)
    begun = list[int]()

    class Counted(parquet_reader._Rows):
        def __init__(self, opened: Any, group: int, at: int, columns: list[str]) -> None:
            begun.append(group)
            super().__init__(opened, group, at, columns)

    monkeypatch.setattr(parquet_reader, "_Rows", Counted)
    found = [record for part in slices for record in part.read()]
    assert begun == [0, 1]
    assert [one.content for one in found if isinstance(one, Document)] == [(Text(str(n)),) for n in range(2000)]
    backwards = [record for part in slices[::-1] for record in part.read()]
    assert {one.where for one in backwards} == {one.where for one in found}


# ------------------------------------------------------------------------------------------------- compressed JSONL


def packed(file: Path, content: bytes) -> Path:
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(content))
    else:
        file.write_bytes(pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True))
    return file


@pytest.mark.parametrize("suffix", ["jsonl.gz", "ndjson.gz", "jsonl.zst"])
def test_compressed_lines(tmp_path: Path, suffix: str) -> None:
    records: list[Mapping[str, Any]] = [{"id": str(n), "content": [text(f"ä {n}")]} for n in range(10)]
    content = write_jsonl(tmp_path / "a.jsonl", records).read_bytes()
    file = packed(tmp_path / f"b.{suffix}", content)
    plain, found = read(tmp_path / "a.jsonl"), read(file)
    assert [(one.id, one.content) for one in found if isinstance(one, Document)] == [
        (one.id, one.content) for one in plain if isinstance(one, Document)
    ]
    (part,) = scan_files([file], slice_records=3)
    assert part.count == 10
    file.write_bytes(file.read_bytes() * 2)  # two members, two frames: as `cat` makes them
    assert len(read(file)) == 20
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read(file)


def test_compressed_lines_that_are_none(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b'{"content": []}\n' * 10)
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / name)


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(n), "content": [text("a\r\nb")]}) for n in range(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert [one.id for one in read(tmp_path / "a.jsonl")] == ["0", "1", "2"]
