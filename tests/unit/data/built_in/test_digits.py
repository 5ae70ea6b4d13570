# mmscale/data/built_in/digits.py and tasks.py: the split, the documents, the shifts and the questions.
"""Tests of the built-in data set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmscale.data.built_in.digits import DESCRIBE, DRAW, WORDS, digit_slices
from mmscale.data.documents.schema import Document, Image, Text
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.image_tokens import LevelsTokenizer, quality
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import Manifest, Task
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.tasks import read_task
from mmscale.data.vocab import BOI, BOS, EOI, EOS
from mmscale.errors import ConfigError, DataError
from tests.unit.data.samples import config, files_of

# the quickstart's
SETTINGS = {"source": "digits", "image": {"kind": "kmeans", "size": 8, "channels": 1, "patch": 2}}
VOCAB = {"text": 384, "image": 128}


def documents(augment: int = 0, *, slice_records: int = 10_000) -> list[Document]:
    return [item for piece in digit_slices(augment=augment, slice_records=slice_records) for item in piece.read()]


def pixels(document: Document) -> np.ndarray:
    (image,) = document.images
    assert isinstance(image.source, np.ndarray)
    return image.source


def word(document: Document) -> str:
    (text,) = [piece.text for piece in document.content if isinstance(piece, Text)]
    return text.split()[-1]


def test_both_directions_and_all_templates() -> None:
    found = documents()
    assert len(found) == 2 * 1797
    kinds = Counter(tuple(type(piece) for piece in document.content) for document in found)
    assert kinds == {(Text, Image): 1797, (Image, Text): 1797}
    texts = Counter(piece.text for document in found for piece in document.content if isinstance(piece, Text))
    assert set(texts) == {template.format(word) for template in DESCRIBE + DRAW for word in WORDS}
    assert min(texts.values()) > 20  # no template goes with some digits only
    assert len({document.id for document in found}) == len(found)


def test_split_is_by_image_and_stratified() -> None:
    found = documents()
    held_out = [document for document in found if document.split == "validation"]
    assert len(held_out) == 2 * 299
    assert len({document.where for document in held_out}) == 299  # both directions of an image are held out together
    per_class = Counter(word(document) for document in held_out)
    assert set(per_class) == set(WORDS) and all(58 <= count <= 62 for count in per_class.values())


def test_grey_levels_survive_exactly() -> None:
    images = np.stack([pixels(document) for document in documents()[::20]])[..., None]
    assert len(np.unique(images)) == 17
    assert quality(LevelsTokenizer(8, 1, 17), images)["exact"] is True


def test_shifted_copies_are_distinct_and_of_training_images_only() -> None:
    plain, augmented = documents(), documents(8)
    training = len([document for document in plain if document.split == "train"])
    assert len(augmented) == len(plain) + 8 * training
    assert [document.id for document in augmented[: len(plain)]] == [document.id for document in plain]
    assert all(document.split == "train" for document in augmented[len(plain) :])
    copies = [document for document in augmented if document.where == augmented[len(plain)].where][::2]
    assert len({pixels(document).tobytes() for document in copies}) == 9
    original = np.pad(pixels(copies[0]), 1)
    windows = {original[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert {pixels(document).tobytes() for document in copies} == windows
    with pytest.raises(ConfigError, match="9 copies, there are 8 directions"):
        digit_slices(augment=9, slice_records=10)


def test_slices_do_not_matter() -> None:
    whole, cut = documents(1), documents(1, slice_records=777)
    assert [document.id for document in whole] == [document.id for document in cut]
    assert all((pixels(one) == pixels(two)).all() for one, two in zip(whole[::50], cut[::50], strict=True))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("digits") / "set"
    return folder, prepare(config(vocab=VOCAB, **SETTINGS), folder, progress=False)


def test_quickstart_set(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert manifest.tokens_per_image == 16
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 2996, "validation": 598}
    assert 0.65 < manifest.share()["image"] < 0.68
    image = summary(folder)["image_tokenizer"]
    assert image["codes"] == 128 and image["psnr_db"] > 23.5
    tokenizer = open_text_tokenizer(folder)
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in WORDS)


def test_task(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert manifest.tasks == (Task(name="digit", file="tasks/digit.jsonl"),)
    items = read_task(folder, manifest, "digit")
    text = open_text_tokenizer(folder)
    assert len(items) == 299
    assert Counter(len(item.choices) for item in items) == {10: 299}
    for item in items:
        start, end = item.answer
        assert item.ids[:2] == (BOS, BOI) and item.ids[18] == EOI and item.ids[end:] == (EOS,)
        assert text.decode(item.ids[start:end]) == f" {WORDS[item.right]}"
        assert [text.decode(choice) for choice in item.choices] == [f" {word}" for word in WORDS]
    assert len({item.right for item in items}) == 10
    assert load_image_tokenizer(folder / "image_tokenizer").grid == (4, 4)


def test_missing_and_damaged_tasks(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = prepared
    with pytest.raises(DataError, match=r"has no task 'colour' \(it has: digit\)"):
        read_task(folder, manifest, "colour")
    (tmp_path / "tasks").mkdir()
    content = files_of(folder)["tasks/digit.jsonl"]
    (tmp_path / "tasks/digit.jsonl").write_bytes(content[:-100])
    with pytest.raises(DataError, match="is damaged"):
        read_task(tmp_path, manifest, "digit")
