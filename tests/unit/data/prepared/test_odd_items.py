# data.prepare.image.damaged, and notes about texts that a tokenizer does not know.
"""Tests of documents whose items are damaged, and of tokenizers that know nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from tokenizers import Tokenizer, models

from mmscale.data.prepared.manifest import Manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.prepared.prepare import prepare
from tests.unit.data.samples import config, image, text, write_jsonl

EDGE = 64


def stored(form: str, **options: Any) -> bytes:
    pixels = np.full((EDGE, EDGE), 204, np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, format=form, **options)
    return stream.getvalue()


def large_text() -> bytes:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (2 << 20), zip=True)
    return stored("PNG", pnginfo=info)


DAMAGED = {
    "half of a JPEG": stored("JPEG", quality=100)[:-40],
    "half of a PNG": stored("PNG", compress_level=0)[:-1500],
    "a text of megabytes": large_text(),
}


def prepared(folder: Path, data: bytes, damaged: str) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(data)
    file = write_jsonl(folder / "d.jsonl", [{"id": "a", "content": [image("a.bin")]}, {"content": [text("good")]}])
    settings = {"kind": "levels", "size": 4, "channels": 1, "damaged": damaged}
    return prepare(config(documents=[str(file)], image=settings, held_out=0), folder / damaged, progress=False)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_rejected_or_salvaged(tmp_path: Path, name: str) -> None:
    rejected, salvaged = (prepared(tmp_path, DAMAGED[name], damaged) for damaged in ("reject", "salvage"))
    assert rejected.rejected == 1 and "a.bin is unreadable" in (tmp_path / "reject/rejected.jsonl").read_text()
    assert salvaged.rejected == 0
    (part,) = salvaged.splits["train"].parts
    ids = read_document(tmp_path / "salvage", part, 0)
    assert ids[2] == 300 + 204 // 17  # its first pixel is what it was


def test_a_jpeg_without_its_end_mark_is_whole(tmp_path: Path) -> None:
    assert prepared(tmp_path, stored("JPEG")[:-2], "reject").rejected == 0


def test_what_is_no_picture_is_never_salvaged(tmp_path: Path) -> None:
    assert prepared(tmp_path, b"no picture", "salvage").rejected == 1


def test_a_tokenizer_that_knows_no_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    words.save(str(tmp_path / "words.json"))
    load = {"load": str(tmp_path / "words.json")}
    for content, said in (("zzza", True), ("abba", False)):
        file = write_jsonl(tmp_path / f"in{said}" / "d.jsonl", [{"content": [text(content)]}])
        prepare(config(documents=[str(file)], text=load), tmp_path / f"out{said}")
        shown = capsys.readouterr().err
        assert ("no token for 75.0% of the texts" in shown) == said
