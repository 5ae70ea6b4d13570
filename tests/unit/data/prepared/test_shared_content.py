"""Pictures and texts that held-out documents share with training documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.data.prepared.inspect_set import lines, summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.shared_content import shared_content
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl


def documents(folder: Path, *, grouped: bool) -> Path:
    """Each picture is described by one document and drawn by another; every third text stands twice."""
    records: list[dict[str, Any]] = []
    for n in range(40):
        save_picture(folder / f"{n}.png", n)
        group = {"group": str(n)} if grouped else {}
        records.append({"id": f"{n}-read", "content": [image(f"{n}.png"), text("a picture")]} | group)
        records.append({"id": f"{n}-draw", "content": [text("a picture"), image(f"{n}.png")]} | group)
        copies = range(2 if n % 3 == 0 else 1)
        records += [{"id": f"{n}-text-{copy}", "content": [text(f"text number {n}")]} | group for copy in copies]
    return write_jsonl(folder / "d.jsonl", records)


@pytest.mark.parametrize("grouped", [False, True])
def test_what_both_splits_have_is_counted_and_said(
    grouped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = config(documents=[str(documents(tmp_path / "in", grouped=grouped))], held_out=0.3)
    prepare(settings, out)
    said = capsys.readouterr().err
    found = shared_content(out, read_manifest(out))
    assert found.pictures[1] > 5 and found.texts[1] > 5
    assert (found.pictures[0] > 0) == (found.texts[0] > 0) == (not grouped)
    assert ("items of held-out documents are in training documents too" in said) == (not grouped)
    assert summary(out)["held_out_in_training"] == {
        "pictures": list(found.pictures),
        "texts": list(found.texts),
    }


def test_every_shared_picture_is_found(tmp_path: Path) -> None:
    """Against a plain comparison of the documents' tokens."""
    out = tmp_path / "out"
    manifest = prepare(
        config(documents=[str(documents(tmp_path / "in", grouped=False))], held_out=0.3), out, progress=False
    )
    pictures = {split: _tokens(out, split) for split in ("train", "validation")}
    wanted = sum(picture in pictures["train"] for picture in pictures["validation"])
    assert shared_content(out, manifest).pictures == (wanted, len(pictures["validation"]))
    assert shared_content(out, manifest, tokens=0).pictures == (0, 0)


def test_the_held_out_documents_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(
        config(documents=[str(documents(tmp_path / "in", grouped=True))], held_out=0.3), out, progress=False
    )
    listed = list(lines(out, "validation"))
    assert len(listed) == manifest.splits["validation"].documents
    assert any("text number" in line for line in listed) and any("[image 0:" in line for line in listed)


def _tokens(out: Path, split: str) -> list[tuple[int, ...]]:
    """Image tokens of every document that has some."""
    from mmscale.data.prepared.parts import read_document

    manifest = read_manifest(out)
    low = manifest.ranges[manifest.modalities.index("image")][0]
    found = []
    for part in manifest.splits[split].parts:
        for index in range(part.documents):
            ids = read_document(out, part, index)
            if (ids >= low).any():
                found.append(tuple(ids[ids >= low].tolist()))
    return found
