# mmscale/data/documents/schema.py, readers.py, modalities/image_files.py: what is read, and every reason to
# refuse a document.
"""Tests of reading documents."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Document, Image, Rejected, Text, Tokens
from mmscale.data.documents.slices import ReadSettings
from mmscale.errors import DataError
from tests.unit.data.samples import image, load_image, picture, save_picture, text, write_jsonl


def read(file: Path, *, slice_records: int = 1000) -> list[Document | Rejected]:
    return [item for piece in scan_files([file], slice_records=slice_records) for item in piece.read()]


def only(file: Path) -> Document | Rejected:
    (item,) = read(file)
    return item


def reason(folder: Path, record: Mapping[str, Any] | str) -> str:
    item = only(write_jsonl(folder / "docs.jsonl", [record]))
    assert isinstance(item, Rejected)
    assert item.where == "docs.jsonl:1"
    return item.reason


def test_interleaved_document(tmp_path: Path) -> None:
    save_picture(tmp_path / "img/1.png", 1)
    speech = {"type": "tokens", "modality": "speech", "ids": [0, 3]}
    content = [text("a red bus"), image("img/1.png"), speech, text("")]
    document = only(
        write_jsonl(tmp_path / "d.jsonl", [{"id": "a1", "content": content, "loss": ["text"], "metadata": "x"}])
    )
    assert isinstance(document, Document)
    assert (document.id, document.loss, document.where) == ("a1", ("text",), "d.jsonl:1")
    first, second, third = document.content
    assert first == Text("a red bus") and third == Tokens("speech", (0, 3))
    assert isinstance(second, Image) and second.source == (tmp_path / "img/1.png").resolve()


def test_id_defaults_to_the_place_and_numbers_are_names(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"content": [text("x")]}, {"id": 7, "content": [text("x")]}])
    assert [item.id for item in read(file)] == ["d.jsonl:1", "7"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ('{"id": "a", "content": [', "broken JSON"),
        ("[1, 2]", "the record is a list, not an object"),
        ("[" * 100_000, "broken JSON"),
        ({"id": "a"}, "no list named content"),
        ({"id": "a", "content": []}, "the document is empty"),
        ({"id": "a", "content": [text("")]}, "the document is empty"),
        ({"id": True, "content": [text("x")]}, "id is neither"),
        ({"id": "a", "content": ["x"]}, "content[0] is a str"),
        ({"id": "a", "content": [{"type": "video"}]}, "type 'video'; known are text, image"),
        ({"id": "a", "content": [{"type": "text", "text": 5}]}, "without a string named text"),
        ('{"id": "a", "content": [{"type": "text", "text": "\\ud800"}]}', "surrogate"),
        ('{"id": "\\ud800", "content": []}', "surrogate"),
        ({"id": "a", "content": [{"type": "image"}]}, "image without a path"),
        ({"id": "a", "content": [image("no.png")]}, "image no.png is missing"),
        ({"id": "a", "content": [image("a\0b")]}, "NUL"),
        ({"id": "a", "content": [image(".")]}, "not a regular file"),
        ({"id": "a", "content": [{"type": "tokens", "ids": [1]}]}, "without the name of a modality"),
        ({"id": "a", "content": [{"type": "tokens", "modality": "speech", "ids": []}]}, "without a list of ids"),
        ({"id": "a", "content": [{"type": "tokens", "modality": "speech", "ids": [-1]}]}, "whole numbers from 0"),
        ({"id": "a", "content": [{"type": "tokens", "modality": "speech", "ids": [True]}]}, "whole numbers from 0"),
        ({"id": "a", "content": [text("x")], "loss": []}, "loss is neither"),
    ],
)
def test_rejection(tmp_path: Path, record: Mapping[str, Any] | str, expected: str) -> None:
    assert expected in reason(tmp_path, record)


def test_not_utf8_is_rejected_and_the_next_line_is_read(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"id": "\xff"}\n\n{"id": "b", "content": [{"type": "text", "text": "x"}]}')
    bad, good = read(file)
    assert isinstance(bad, Rejected) and bad.reason == "not UTF-8"
    assert isinstance(good, Document) and good.where == "d.jsonl:3"  # the blank line counts


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/hostname", "img/../../secret.png", "link.png", "linked/secret.png"]
)
def test_image_path_may_not_leave_the_folder(tmp_path: Path, path: str) -> None:
    save_picture(tmp_path / "secret.png", 1)
    data = tmp_path / "data"
    (data / "img").mkdir(parents=True)
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "linked").symlink_to(tmp_path)
    assert "leaves the folder" in reason(data, {"id": "a", "content": [image(path)]})


def test_link_inside_the_folder_is_followed_and_a_loop_is_not(tmp_path: Path) -> None:
    save_picture(tmp_path / "real.png", 1)
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert isinstance(only(write_jsonl(tmp_path / "d.jsonl", [{"content": [image("link.png")]}])), Document)
    assert "loop.png" in reason(tmp_path, {"content": [image("loop.png")]})


def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in reason(tmp_path, {"content": [image("pipe.png")]})


@pytest.mark.parametrize("slice_records", [1, 3, 7, 100])
def test_slices_cover_the_file(tmp_path: Path, slice_records: int) -> None:
    lines = [json.dumps({"id": str(n), "content": [text("ä" * n + "x")]}) for n in range(10)]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")  # no newline at the end
    slices = scan_files([file], slice_records=slice_records)
    assert all(piece.count <= slice_records for piece in slices)
    assert [item.id for piece in slices for item in piece.read()] == [str(n) for n in range(10)]
    assert len({piece.identity for piece in slices}) == len(slices)


def test_identity_follows_the_content_not_the_folder(tmp_path: Path) -> None:
    one, two, other = (
        scan_files([write_jsonl(tmp_path / name / "d.jsonl", [{"content": [text(word)]}])], slice_records=9)[0].identity
        for name, word in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    assert one == two != other


def test_split_is_a_function_of_the_id() -> None:
    documents = [Document(f"doc{n}", (Text("x"),), "here") for n in range(2000)]
    held_out = [document.id for document in documents if document.split_for(0.1) == "validation"]
    assert 150 < len(held_out) < 250
    assert all(document.split_for(0.0) == "train" for document in documents)
    assert Document("doc1", (), "", split="validation").split_for(0.0) == "validation"


def test_documents_of_a_group_are_in_one_split() -> None:
    splits = [
        {Document(f"{n}-{way}", (), "", group=f"{n}").split_for(0.5) for way in ("read", "draw")} for n in range(100)
    ]
    assert all(len(split) == 1 for split in splits) and len(set.union(*splits)) == 2


def test_keys_of_a_record(tmp_path: Path) -> None:
    record: dict[str, Any] = {"id": "a", "content": [text("x")], "split": "validation", "group": 7}
    document = only(write_jsonl(tmp_path / "d.jsonl", [record | {"metadata": {"licence": "mit"}, "unused": None}]))
    assert isinstance(document, Document)
    assert document.split_for(0.0) == "validation" and document.group == "7"
    assert "did you mean 'split'?" in reason(tmp_path, record | {"splits": "train"})
    assert "unknown key 'task'" in reason(tmp_path, record | {"task": "digit"})
    assert "neither 'train' nor 'validation'" in reason(tmp_path, record | {"split": "test"})
    assert "group is neither" in reason(tmp_path, record | {"group": [1]})
    assert "group is empty" in reason(tmp_path, record | {"group": ""})
    file = write_jsonl(tmp_path / "e.jsonl", [record | {"task": "digit"}])
    (piece,) = scan_files([file], slice_records=9, settings=ReadSettings(ignore=("task",)))
    assert isinstance(next(piece.read()), Document)


@pytest.mark.parametrize("form", ["content", "messages"])
@pytest.mark.parametrize(
    ("piece", "key"),
    [
        ({"type": "text", "text": "x", "loss": "none"}, "loss"),
        ({"type": "image", "path": "0.png", "caption": "a bus"}, "caption"),
        ({"type": "tokens", "modality": "image", "ids": [3], "shape": [1]}, "shape"),
    ],
)
def test_keys_of_a_piece(tmp_path: Path, piece: dict[str, Any], key: str, form: str) -> None:
    (tmp_path / "0.png").write_bytes(b"0")

    def record(piece: dict[str, Any]) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "y"}
        return {form: [piece] if form == "content" else [{"role": "user", "content": [piece]}, answer]}

    refused = reason(tmp_path, record(piece))
    assert f"key {key!r}" in refused and "[0]" in refused and "data.prepare.ignore" in refused
    file = write_jsonl(tmp_path / "ignored.jsonl", [record(piece)])
    (part,) = scan_files([file], slice_records=9, settings=ReadSettings(ignore=(key,)))
    assert isinstance(next(part.read()), Document)
    # Rows of tables have the keys of all types, with null where there is nothing.
    assert isinstance(only(write_jsonl(tmp_path / "row.jsonl", [record(piece | {key: None, "bytes": None})])), Document)


def test_columns_of_a_parquet_file(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    file = tmp_path / "d.parquet"
    content = [json.dumps([text("x")])] * 2
    parquet.write_table(pyarrow.table({"content": content, "group": ["a", "a"], "url": ["u", "v"]}), file)
    with pytest.raises(DataError, match="no keys of documents: url") as raised:
        scan_files([file], slice_records=9)
    assert "data.prepare.ignore=[url]" in str(raised.value.remedy)
    (piece,) = scan_files([file], slice_records=9, settings=ReadSettings(ignore=("url",)))
    assert [item.group for item in piece.read() if isinstance(item, Document)] == ["a", "a"]


def test_listing(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_jsonl(tmp_path / name, [])
    found = list_files([str(tmp_path / "b.jsonl"), str(tmp_path / "**/*.jsonl")])
    assert [file.name for file in found] == ["b.jsonl", "a.jsonl", "c.jsonl"]


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no document file .*none\.jsonl"):
        list_files([str(tmp_path / "none.jsonl")])
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match="of no known kind"):
        list_files([str(tmp_path / "a.csv")])
    with pytest.raises(DataError, match="no document file is named"):
        list_files([])


# -------------------------------------------------------------------------------------------------------- parquet


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    save_picture(tmp_path / "1.png", 1)
    data = (tmp_path / "1.png").read_bytes()
    items = [
        [{"type": "text", "text": f"row {n}"}, {"type": "image", "path": "1.png"}, {"type": "image", "bytes": data}]
        for n in range(10)
    ]
    table = pa.table({"id": [f"r{n}" for n in range(10)], "content": items, "loss": ["all"] * 10})
    file = tmp_path / "d.parquet"
    parquet.write_table(table, file, row_group_size=4)
    documents = read(file, slice_records=3)
    assert [item.id for item in documents] == [f"r{n}" for n in range(10)]
    assert isinstance(documents[5], Document)
    first, second, third = documents[5].content
    assert first == Text("row 5")
    assert isinstance(second, Image) and isinstance(third, Image) and third.source == data


def test_parquet_with_json_columns_and_bad_ones(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "d.parquet"
    parquet.write_table(pa.table({"content": [json.dumps([text("x")]), "[broken"]}), file)
    good, bad = read(file)
    assert isinstance(good, Document) and good.id == "d.parquet:0"
    assert isinstance(bad, Rejected) and "content" in bad.reason
    parquet.write_table(pa.table({"caption": ["x"]}), file)
    with pytest.raises(DataError, match=r"no column named content .*, only caption"):
        read(file)
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a parquet file"):
        read(file)


# ------------------------------------------------------------------------------------------------------------ tar


def write_tar(file: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture(seed)[..., 0]).save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize("slice_records", [1, 2, 100])
def test_webdataset_pairs(tmp_path: Path, slice_records: int) -> None:
    members = {}
    for n in range(5):
        members |= {f"shard/{n:04d}.png": png(n), f"shard/{n:04d}.txt": f"number {n}".encode()}
    documents = read(write_tar(tmp_path / "d.tar", members), slice_records=slice_records)
    assert [item.id for item in documents] == [f"shard/{n:04d}" for n in range(5)]
    kinds = []
    for n, document in enumerate(documents):
        assert isinstance(document, Document)
        pieces = {type(piece): piece for piece in document.content}
        assert pieces[Text] == Text(f"number {n}")
        np.testing.assert_array_equal(load_image(document.images[0], size=4, channels=1), picture(n))
        kinds.append(type(document.content[0]))
    assert set(kinds) == {Text, Image}  # some describe, some draw


def test_webdataset_documents(tmp_path: Path) -> None:
    record = {"id": "mine", "content": [text("two"), image("a.png"), image("x.b.png")]}
    members = {"x.json": json.dumps(record).encode(), "x.a.png": png(1), "x.b.png": png(2)}
    members |= {"y.json": b"{", "z.json": json.dumps({"content": [image("../x.a.png")]}).encode()}
    good, broken, outside = read(write_tar(tmp_path / "d.tar", members))
    assert isinstance(good, Document) and good.id == "mine"
    assert [picture.source for picture in good.images] == [png(1), png(2)]
    assert isinstance(broken, Rejected) and "broken JSON" in broken.reason
    assert isinstance(outside, Rejected) and "missing from sample z" in outside.reason


def test_damaged_tar(tmp_path: Path) -> None:
    file = tmp_path / "d.tar"
    file.write_bytes(b"no archive at all" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        read(file)


# --------------------------------------------------------------------------------------------------------- pictures


def test_picture_of_the_right_size_is_kept_exactly() -> None:
    pixels = picture(3, size=8, channels=3)
    np.testing.assert_array_equal(load_image(Image(pixels), size=8, channels=3), pixels)
    np.testing.assert_array_equal(load_image(Image(picture(3)[..., 0]), size=4, channels=1), picture(3))


def test_short_side_is_resized_and_the_centre_cropped() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # the middle third is white
    loaded = load_image(Image(wide), size=10, channels=1)
    assert loaded.shape == (10, 10, 1) and loaded.min() == 255
    assert load_image(Image(wide), size=4, channels=3).shape == (4, 4, 3)
    assert load_image(Image(np.zeros((1, 999, 3), np.uint8)), size=4, channels=3).shape == (4, 4, 3)


def test_transparency_lies_on_white_and_16_bit_grey_is_scaled() -> None:
    assert load_image(Image(np.zeros((4, 4, 4), np.uint8)), size=4, channels=3).min() == 255
    stream = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(stream, format="PNG")
    assert set(load_image(Image(stream.getvalue()), size=4, channels=1).ravel()) == {128}


@pytest.mark.parametrize("data", [b"", b"no picture", png(1)[:60]])
def test_unreadable_picture(data: bytes) -> None:
    with pytest.raises(BadDocumentError, match=r"image a\.png is unreadable"):
        load_image(Image(data, "a.png"), size=4, channels=1)


def test_huge_picture_is_refused_before_it_is_unpacked() -> None:
    stream = io.BytesIO()
    PIL.Image.new("1", (12_000, 9_000)).save(stream, format="PNG")
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(BadDocumentError, match="too many"):
        load_image(Image(stream.getvalue(), "bomb.png"), size=4, channels=1)
