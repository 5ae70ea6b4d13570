"""Pictures and texts that held-out documents share with training documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.data.prepared import content_facts
from mmscale.data.prepared.inspect_set import lines, summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.repeated_ids import keep_ids, repeated_ids
from mmscale.data.prepared.shared_content import shared_content
from tests.unit.data.modalities.test_audio import tone, wav
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
    assert ("of held-out documents are in training documents too" in said) == (not grouped)
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


def repeating(folder: Path) -> Path:
    """Of 40 documents 12 equal an earlier one; 6 of these have its id, and 4 other documents have one id."""
    records: list[dict[str, Any]] = []
    for n in range(20):
        save_picture(folder / f"{n}.png", n)
        records.append({"id": str(n), "content": [image(f"{n}.png"), text(f"name {n}")]})
    records += [{"id": str(n) if n < 6 else f"again-{n}"} | {"content": records[n]["content"]} for n in range(12)]
    records += [{"id": "same", "content": [image(f"{n}.png"), text(f"other {n}")]} for n in range(4)]
    records += [{"content": [text(f"no id, {n}")]} for n in range(4)]
    return write_jsonl(folder / "d.jsonl", records)


def test_what_training_repeats_is_counted_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", config(documents=[str(repeating(tmp_path / "in"))], held_out=0.0)
    prepare(settings, out)
    said = capsys.readouterr().err
    assert said.count("note: 12 of 40 training documents (30.0%) equal an earlier one") == 1
    assert said.count("note: 9 of 40 documents (22.5%) have the id of an earlier one") == 1
    repeated = {"documents": [12, 40], "pictures": [16, 36], "texts": [0, 4], "ids": [9, 40]}
    assert summary(out)["repeated"] == repeated
    prepare(settings, out)
    assert "note: 12 of 40 training documents (30.0%)" in capsys.readouterr().err  # it is still true
    # Comparing takes seconds on large data, and inspect finds what prepare has kept, but never of other documents.
    with monkeypatch.context() as patched:
        patched.setattr(content_facts, "keys_of", None)
        assert summary(out)["repeated"] == repeated
    prepare(config(documents=[str(documents(tmp_path / "other", grouped=True))], held_out=0.0), out, overwrite=True)
    assert summary(out)["repeated"]["documents"] == [14, 134]


def test_each_modality_has_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 recordings of 2 kinds and 12 pictures of 3 kinds; held out are one recording and one picture that repeat."""
    for n in range(3):
        save_picture(tmp_path / f"{n}.png", n)
        (tmp_path / f"{n}.wav").write_bytes(wav(tone(300.0 + 800 * n)))
    records = [{"id": f"i{n}", "content": [text(f"p{n}"), image(f"{n % 3}.png")], "split": "train"} for n in range(12)]
    sounds = [{"type": "audio", "path": f"{n % 2}.wav"} for n in range(8)]
    records += [{"id": f"s{n}", "content": [text(f"s{n}"), one], "split": "train"} for n, one in enumerate(sounds)]
    records += [{"id": "h", "content": [text("h"), image("0.png"), sounds[1]], "split": "validation"}]
    file, out = write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "out"
    kinds = "{name: text, size: 300}, {name: image, size: 16}, {name: audio, size: 64, marks: true}"
    images = [f"data.prepare.image.{one}" for one in ("kind=levels", "size=4", "channels=1")]
    command = ["data", "prepare", "--documents", str(file), "--out", str(out), f"vocab.modalities=[{kinds}]", *images]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "1 of 1 pictures (100.0%) of held-out documents are in training documents too" in printed.err
    assert "1 of 1 recordings (100.0%) of held-out documents are in training documents too" in printed.err
    said = " ".join(printed.out.split())
    assert "9 of 12 training pictures (75.0%) equal an earlier one: 3 are different (equal tokens, not equal" in said
    assert "6 of 8 training recordings (75.0%) equal an earlier one: 2 are different" in said
    found = summary(out)
    assert found["repeated"] == {
        "documents": [0, 20],
        "pictures": [9, 12],
        "audio": [6, 8],
        "texts": [0, 0],
        "ids": [0, 21],
    }
    assert found["held_out_in_training"] == {"pictures": [1, 1], "audio": [1, 1], "texts": [0, 0]}


def test_a_set_of_an_earlier_version_has_no_ids(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(config(documents=[str(repeating(tmp_path / "in"))], held_out=0.0), out, progress=False)
    (out / ".cache" / "content.json").unlink()
    (file,) = (out / "done").glob("*.ids.npy")
    file.unlink()
    assert summary(out)["repeated"]["ids"] is None and summary(out)["repeated"]["documents"] == [12, 40]


def test_remarks_are_not_printed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data prepare` says them on stderr, and its table on stdout has what it has not said."""
    for n in range(8):
        PIL.Image.fromarray(np.full((8, 16), 30 * n, np.uint8)).save(tmp_path / f"{n}.png")
    records = [{"id": str(n), "content": [image(f"{n % 4}.png"), text(f"name {n % 5}")]} for n in range(40)]
    file, out = write_jsonl(tmp_path / "d.jsonl", records), str(tmp_path / "out")
    vocabulary = "vocab.modalities=[{name: text, size: 300}, {name: image, size: 16}]"
    share = "data.prepare.held_out=0.2"
    images = [f"data.prepare.image.{one}" for one in ("kind=levels", "size=4", "channels=1")]
    for _ in range(2):
        assert main(["data", "prepare", "--documents", str(file), "--out", out, vocabulary, *images, share]) == 0
        printed = capsys.readouterr()
        for remark in ("were not square", "of held-out documents", "training documents ("):
            assert printed.err.count(remark) == 1 and remark not in printed.out, remark
        assert "equal an earlier one: 4 are different" in printed.out
    assert main(["data", "inspect", out]) == 0
    printed = capsys.readouterr()
    assert "were not square" in printed.out and "--held-out` marks them" in " ".join(printed.out.split())
    assert main(["data", "inspect", out, "--held-out"]) == 0
    marked = [line.endswith("(in training too)") for line in capsys.readouterr().out.splitlines()]
    assert marked and all(marked)  # 4 pictures in 40 documents


def test_training_on_what_the_companion_holds_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second source with the tokenizers of the first one: its split is its own, and the pictures may be the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    file = documents(tmp_path / "in", grouped=True)
    prepare(config(documents=[str(file)], held_out=0.3), first, progress=False)
    capsys.readouterr()
    arguments = ["data", "prepare", "--documents", str(file), "--like", str(first), "--out", str(second)]
    assert main([*arguments, "data.prepare.held_out=0"]) == 0
    said = capsys.readouterr().err
    held_out = shared_content(first, read_manifest(first)).pictures[1]
    assert f"note: {held_out} of {held_out} pictures (100.0%) of held-out documents of {first}" in said
    assert f"in training documents of {second} too" in said


@pytest.mark.parametrize("kept", [8, 64, 1000])
def test_repeated_ids_are_counted_over_parts(tmp_path: Path, kept: int) -> None:
    """Exactly if every hash was kept; the smallest ones of every part give an estimate."""
    random = np.random.default_rng(3)
    ids = [f"id {number}" for number in random.integers(0, 500, 900)]
    files = [tmp_path / f"{n}.npy" for n in range(3)]
    for n, file in enumerate(files):
        keep_ids(file, ids[n::3], kept=kept)
    wanted = len(ids) - len(set(ids))
    found = repeated_ids(files, documents=len(ids), kept=kept)
    assert found is not None and found[1] == 900
    assert found[0] == wanted if kept == 1000 else abs(found[0] - wanted) < 0.35 * wanted
    keep_ids(files[0], ["one"] * 300, kept=kept)
    assert repeated_ids(files[:1], documents=300, kept=kept) == (299, 300)
    files[1].write_bytes(b"")
    assert repeated_ids(files, documents=900, kept=kept) is None


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
