# mmscale/data/documents/{rows,parquet,arrow}.py: tables as Hugging Face datasets write them.
"""Tests of rows whose columns make up documents."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.schema import Document, Image, Rejected, Text, Tokens
from mmscale.data.documents.slices import ReadSettings
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
from tests.unit.data.documents.test_reader_faults import tar
from tests.unit.data.samples import config, picture, save_picture, text, write_jsonl

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture(seed)[..., 0]).save(stream, format="PNG")
    return stream.getvalue()


def table(count: int) -> Any:
    """As Hugging Face stores images: their bytes, and a path that is only a name."""
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(count)]
    return pa.table({"image": images, "text": [f"number {n}" for n in range(count)], "width": [4] * count})


def stream(rows: Any, file: Path, *, batch: int = 4, form: str = "stream") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink:
        made = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with made(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=batch)
    return file


def read(names: list[str], *columns: str, slice_records: int = 3) -> list[Document | Rejected]:
    settings = ReadSettings(columns=columns)
    return [
        one
        for part in scan_files(list_files(names), slice_records=slice_records, settings=settings)
        for one in part.read()
    ]


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
@pytest.mark.parametrize("slice_records", [1, 3, 100])
def test_pictures_with_their_bytes(tmp_path: Path, form: str, slice_records: int) -> None:
    if form == "parquet":
        pq.write_table(table(10), file := tmp_path / "a.parquet", row_group_size=4)
    else:
        file = stream(table(10), tmp_path / "a.arrow", form=form)
    found = read([str(file)], "image", "text", slice_records=slice_records)
    for number, one in enumerate(found):
        assert isinstance(one, Document)
        first, second = one.content
        assert isinstance(first, Image) and first.source == png(number) and second == Text(f"number {number}")
    assert len(found) == 10
    with pytest.raises(DataError, match="no column named content") as raised:
        read([str(file)])
    assert "data.prepare.columns=[image,text]" in str(raised.value.remedy)
    with pytest.raises(DataError, match="has no column caption, only image, text, width"):
        read([str(file)], "caption")


def test_a_folder_that_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    content = {"image": [{"bytes": png(n), "path": None} for n in range(9)], "text": [f"n {n}" for n in range(9)]}
    whole = datasets.Dataset.from_dict(content, features=features)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    assert [one.content[1] for one in read([str(tmp_path / "one")], "image", "text") if isinstance(one, Document)] == [
        Text(f"n {n}") for n in range(9)
    ]
    splits = datasets.DatasetDict({"train": whole.select(range(6)), "validation": whole.select(range(6, 9))})
    splits.save_to_disk(tmp_path / "both")
    found = read([str(tmp_path / "both")], "image", "text")
    assert [one.split for one in found if isinstance(one, Document)] == ["train"] * 6 + ["validation"] * 3
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "test")
    with pytest.raises(DataError, match="has a split test"):
        read([str(tmp_path / "test")], "image", "text")
    settings = config(documents=[str(tmp_path / "both")], columns=["image", "text"])
    manifest = prepare(settings, tmp_path / "out", progress=False)
    assert (manifest.splits["train"].documents, manifest.splits["validation"].documents) == (6, 3)
    assert manifest.splits["train"].tokens("image") == 6 * 16


HUB = ("train-00000-of-00001", "validation-00000-of-00001-0a1b", "test-00000-of-00001")
LAYOUTS = {
    "shards": [f"data/{name}" for name in HUB],
    "configurations": [f"en/{name}" for name in HUB],
    "names": ["train", "dev", "evaluation"],
    "folders": ["train/0", "validation/0", "test/0"],
}


@pytest.mark.parametrize("form", ["folder", "glob"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_of_a_repository_of_the_hub(tmp_path: Path, layout: str, form: str) -> None:
    root = tmp_path / "repository"
    for number, name in enumerate(LAYOUTS[layout]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        rows = {"text": [f"{number} {row}" for row in range(30)]}
        pq.write_table(pa.table(rows), root / f"{name}.parquet")
    named = str(root) if form == "folder" else f"{root}/**/*.parquet"
    with pytest.raises(DataError, match=r"has a split test \("):
        list_files([named])
    train, held_out, test = (root / f"{name}.parquet" for name in LAYOUTS[layout])
    assert {one.split for one in read([str(test)], "text") if isinstance(one, Document)} == {None}  # named: wanted
    test.unlink()
    found = read([named], "text")
    assert {(one.split, one.content[0].text[0]) for one in found if isinstance(one, Document)} == {
        ("train", "0"),
        ("validation", "1"),
    }
    settings = config(documents=[named], columns=["text"], held_out=0.5)
    manifest = prepare(settings, tmp_path / "out", progress=False)
    assert [manifest.splits[name].documents for name in ("train", "validation")] == [30, 30]
    held_out.unlink()  # a set without held-out files: a share is held out, as before
    (alone,) = scan_files([train], slice_records=100, settings=ReadSettings(columns=("text",)))
    assert alone.run.split is None and alone.identity.endswith(":0+30")


def test_a_row_knows_its_split_better_than_the_name_of_its_file(tmp_path: Path) -> None:
    rows = {"content": [[text("a")], [text("b")]], "split": ["train", None]}
    pq.write_table(pa.table(rows), tmp_path / "validation-00000-of-00001.parquet")
    assert [one.split for one in read([str(tmp_path)]) if isinstance(one, Document)] == ["train", "validation"]


def test_folders_of_parquet_files_and_what_is_none(tmp_path: Path) -> None:
    for name in ("train-0", "train-1"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table(2), tmp_path / f"data/{name}.parquet")
    assert len(read([str(tmp_path)], "text")) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data set of Hugging Face and no parquet file"):
        read([str(tmp_path / "empty")], "text")
    (tmp_path / "empty/state.json").write_text('{"_data_files": [{"filename": "../data/x.arrow"}]}')
    with pytest.raises(DataError, match=r"lacks x\.arrow"):
        read([str(tmp_path / "empty")], "text")
    (tmp_path / "empty/state.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read"):
        read([str(tmp_path / "empty")], "text")


def test_parallel_lists_are_interleaved(tmp_path: Path) -> None:
    """OBELICS and MMC4: a list of texts and one of pictures, with nothing where the other has something."""
    save_picture(tmp_path / "1.png", 1)
    rows = {"texts": [["before", None, "after"]], "images": [[None, {"path": "1.png", "bytes": None}, None]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    (one,) = read([str(tmp_path / "a.parquet")], "texts", "images")
    assert isinstance(one, Document)
    first, second, third = one.content
    assert (first, third) == (Text("before"), Text("after")) and isinstance(second, Image)


def test_codes_made_elsewhere(tmp_path: Path) -> None:
    """A column of whole numbers, .npy files beside JSONL, and members of an archive."""
    pq.write_table(pa.table({"image": [[3, 1, 2]], "text": ["x"]}), tmp_path / "a.parquet")
    np.save(tmp_path / "codes.npy", np.array([[3], [1], [2]], np.uint16))
    codes = {"type": "tokens", "modality": "image", "path": "codes.npy"}
    write_jsonl(tmp_path / "b.jsonl", [{"content": [codes, text("x")]}])
    content = (tmp_path / "codes.npy").read_bytes()
    tar(tmp_path / "c.tar", [("1.npy", content), ("1.txt", b"x")])
    for names, columns in ((["a.parquet"], ("image", "text")), (["b.jsonl"], ()), (["c.tar"], ())):
        (one,) = read([str(tmp_path / name) for name in names], *columns)
        assert isinstance(one, Document), one
        assert {Tokens("image", (3, 1, 2)), Text("x")} == set(one.content)
    bad = {"cut": content[:-1], "floats": None, "nothing": b"", "negative": None}
    for name, data in bad.items():
        if data is None:
            np.save(tmp_path / "codes.npy", np.array([-1]) if name == "negative" else np.array([0.5]))
        else:
            (tmp_path / "codes.npy").write_bytes(data)
        tar(tmp_path / "c.tar", [("1.npy", (tmp_path / "codes.npy").read_bytes()), ("1.txt", b"x")])
        for file in ("b.jsonl", "c.tar"):
            (one,) = read([str(tmp_path / file)])
            assert isinstance(one, Rejected) and "npy" in one.reason, name


def test_rows_with_nothing_and_of_other_kinds(tmp_path: Path) -> None:
    rows = {"text": pa.array(["a", None, "c"]), "image": pa.nulls(3, pa.string()), "number": [1, 2, 3]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    found = read([str(tmp_path / "a.parquet")], "image", "text")
    assert [type(one) for one in found] == [Document, Rejected, Document]
    assert all(isinstance(one, Rejected) for one in read([str(tmp_path / "a.parquet")], "number"))


@pytest.mark.parametrize("damage", ["cut", "nothing", "others"])
def test_damaged_arrow_files(tmp_path: Path, damage: str) -> None:
    file = stream(table(10), tmp_path / "a.arrow")
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-700], "nothing": b"", "others": b"no arrow " * 50}[damage])
    with pytest.raises(DataError, match=r"is not an Arrow file|cannot be read"):
        read([str(file)], "image", "text")


def test_a_picture_beside_a_table_that_changes(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png", 1)
    pq.write_table(pa.table({"image": [{"path": "1.png"}], "text": ["x"]}), tmp_path / "a.parquet")
    states = []
    for seed in (1, 2):
        save_picture(tmp_path / "1.png", seed)
        (part,) = scan_files(
            list_files([str(tmp_path / "a.parquet")]), slice_records=9, settings=ReadSettings(columns=("image", "text"))
        )
        states.append(part.items)
        assert np.any(states)
    assert states[0] != states[1]
