# examples/digits/write_documents.py: the split, the documents, the shifts and the questions, and what they become.
"""Tests of the handwritten digits as documents."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.image_tokens import LevelsTokenizer, quality
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import Manifest, Task
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.tasks import read_task
from mmscale.data.vocab import BOI, BOS, EOI, EOS
from mmscale.errors import DataError
from tests import digits
from tests.unit.data.samples import config, files_of

IMAGE = {"kind": "kmeans", "size": 8, "channels": 1, "patch": 2}  # the quickstart's
VOCAB = {"text": 384, "image": 128}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# SHA-256 of parts, tokenizers and tasks that were prepared when the digits were a part of the package, with one token
# for each of 17 grey levels; by shifted copies of each training image.
GOLDEN = {
    0: "2af9a2e5d6f5ea6be978c06a303fd6e0c5b494c96b114c4c632ae066f48e5e3b",
    4: "48fdf3bae344899ffeb66b98050220dd687b93387ad21f060cf2592e370f694f",
}
COMPARED = ("train/", "validation/", "text_tokenizer/", "image_tokenizer/", "tasks/")


def records(folder: Path, name: str = "documents") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def part(record: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [one for one in record["content"] if one["type"] == kind]
    return dict(found)


def pixels(folder: Path, record: dict[str, Any]) -> np.ndarray:
    with PIL.Image.open(folder / part(record, "image")["path"]) as opened:
        assert opened.mode == "L"
        return np.asarray(opened)


def index(record: dict[str, Any]) -> str:
    return str(record["id"].split("-")[1])


def test_both_directions_and_all_templates(digits_documents: Path) -> None:
    program, found = digits.program("digits/write_documents"), records(digits_documents)
    assert len(found) == 2 * 1797
    kinds = Counter(tuple(piece["type"] for piece in record["content"]) for record in found)
    assert kinds == {("text", "image"): 1797, ("image", "text"): 1797}
    texts = Counter(part(record, "text")["text"] for record in found)
    assert set(texts) == {one.format(word) for one in program.DESCRIBE + program.DRAW for word in WORDS}
    assert min(texts.values()) > 20  # no template goes with some digits only
    assert len({record["id"] for record in found}) == len(found)


def test_split_is_by_image_and_stratified(digits_documents: Path) -> None:
    held_out = [record for record in records(digits_documents) if record["split"] == "validation"]
    assert len(held_out) == 2 * 299
    assert len({index(record) for record in held_out}) == 299  # both directions of an image are held out together
    per_class = Counter(part(record, "text")["text"].split()[-1] for record in held_out)
    assert set(per_class) == set(WORDS) and all(58 <= count <= 62 for count in per_class.values())


def test_grey_levels_survive_exactly(digits_documents: Path) -> None:
    images = np.stack([pixels(digits_documents, record) for record in records(digits_documents)[::20]])[..., None]
    assert len(np.unique(images)) == 17
    assert quality(LevelsTokenizer(8, 1, 17), images)["exact"] is True


def test_shifted_copies_are_distinct_and_of_training_images_only(tmp_path: Path) -> None:
    program = digits.program("digits/write_documents")
    found = program.digits()
    pictures = list(program.pictures(found, 8))
    assert [(index, copy) for index, copy, _ in pictures[:1797]] == [(index, 0) for index in range(1797)]
    training = np.flatnonzero(~found.held_out).tolist()
    copies = [(index, copy) for copy in range(1, 9) for index in training]
    assert [(index, copy) for index, copy, _ in pictures[1797:]] == copies
    own = [pixels for index, _, pixels in pictures if index == training[0]]
    assert len({one.tobytes() for one in own}) == 9
    original = np.pad(own[0], 1)
    windows = {original[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert {one.tobytes() for one in own} == windows
    with pytest.raises(SystemExit) as refused:
        digits.write(tmp_path, copies=9)
    assert refused.value.code == 2


def test_a_second_start_leaves_finished_files_alone_and_mends_others(tmp_path: Path) -> None:
    """`data prepare` makes parts again if a picture has another time."""
    digits.write(tmp_path)
    damaged, lost = tmp_path / "img/0001-0.png", tmp_path / "img/0002-0.png"
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file not in (damaged, lost)}
    before = files_of(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:20])
    lost.unlink()
    digits.write(tmp_path)
    assert files_of(tmp_path) == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


def levels(documents: Path, out: Path) -> Manifest:
    image = {"kind": "levels", "size": 8, "channels": 1}
    return prepare(
        config(vocab={"text": 384, "image": 17}, image=image, **digits.named(documents)), out, progress=False
    )


@pytest.fixture(scope="module")
def prepared(digits_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("digits") / "set"
    return folder, levels(digits_documents, folder)


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name, content in files_of(folder).items():
        if name.startswith(COMPARED):
            found.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()


def test_prepared_they_are_what_the_package_prepared_itself(prepared: tuple[Path, Manifest]) -> None:
    assert digest(prepared[0]) == GOLDEN[0]


@pytest.mark.long
def test_so_are_shifted_copies(tmp_path: Path) -> None:
    levels(digits.write(tmp_path / "documents", copies=4), tmp_path / "set")
    assert digest(tmp_path / "set") == GOLDEN[4]


@pytest.mark.long
def test_quickstart_set(digits_documents: Path, tmp_path: Path) -> None:
    settings = config(vocab=VOCAB, image=IMAGE, **digits.named(digits_documents))
    manifest = prepare(settings, tmp_path / "set", progress=False)
    assert manifest.tokens_per_image == 16
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 2996, "validation": 598}
    assert 0.65 < manifest.share()["image"] < 0.68
    image = summary(tmp_path / "set")["image_tokenizer"]
    assert image["codes"] == 128 and image["psnr_db"] > 23.5
    assert load_image_tokenizer(tmp_path / "set/image_tokenizer").grid == (4, 4)


def test_task(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert manifest.tasks == (Task(name="digit", file="tasks/digit.jsonl"),)
    items = read_task(folder, manifest, "digit")
    text = open_text_tokenizer(folder)
    assert all(len(text.encode(f" {word}")) == 1 for word in WORDS)
    assert len(items) == 299
    assert Counter(len(item.choices) for item in items) == {10: 299}
    for item in items:
        start, end = item.answer
        assert item.ids[:2] == (BOS, BOI) and item.ids[66] == EOI and item.ids[end:] == (EOS,)
        assert text.decode(item.ids[start:end]) == f" {WORDS[item.right]}"
        assert [text.decode(choice) for choice in item.choices] == [f" {word}" for word in WORDS]
    assert len({item.right for item in items}) == 10


def test_missing_and_damaged_tasks(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = prepared
    with pytest.raises(DataError, match=r"has no task 'colour' \(it has: digit\)"):
        read_task(folder, manifest, "colour")
    (tmp_path / "tasks").mkdir()
    content = files_of(folder)["tasks/digit.jsonl"]
    (tmp_path / "tasks/digit.jsonl").write_bytes(content[:-100])
    with pytest.raises(DataError, match="is damaged"):
        read_task(tmp_path, manifest, "digit")
