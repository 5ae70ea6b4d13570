# mmscale/data/stream/conditions.py: which labels count for the loss of one modality given another.
"""Tests of conditional labels, against a loop over documents, labels and earlier tokens."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.config import VocabConfig
from mmscale.data.stream.conditions import conditional_labels, conditional_names
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import BOI, BOS, EOI, EOS, Vocabulary
from mmscale.report.charts import _Builder

TEXT, IMAGE, SOUND = 20, 40, 60  # an id of each


def vocabulary(*names: str) -> Vocabulary:
    return Vocabulary.from_config(VocabConfig.model_validate({"modalities": [{"name": n, "size": 30} for n in names]}))


def reference(documents: list[np.ndarray], known: Vocabulary, own: str, other: str) -> list[list[float]]:
    """For each document and label: 1 if the label is of one modality and a token of the other stands before it."""

    def content(token: int) -> str:
        return "" if token < len(known.specials) else known.names[token // 30]

    found = []
    for ids in documents:
        labels = [ids[at + 1] if at + 1 < len(ids) else 0 for at in range(len(ids))]
        found.append(
            [
                float(content(label) == own and any(content(token) == other for token in ids[: at + 1]))
                for at, label in enumerate(labels)
            ]
        )
    return found


@pytest.mark.parametrize("names", [("text",), ("text", "image"), ("text", "image", "sound")], ids=len)
@pytest.mark.parametrize("multiple", [1, 4])
def test_labels_are_those_of_the_definition(names: tuple[str, ...], multiple: int) -> None:
    known, rng = vocabulary(*names), np.random.default_rng(len(names))
    rows = [
        [rng.choice([BOS, EOS, BOI, EOI, *(TEXT + 20 * m for m in range(len(names)))], size=size) for size in sizes]
        for sizes in ((9, 4, 12), (16,), ())
    ]
    batch, places = pack_rows(rows, vocabulary=known, seq_length=32, multiple=multiple)
    found = conditional_labels(batch, known)
    assert found.shape == (len(names) - 1, 3, 32)
    pairs = conditional_names(known.names)
    assert len(pairs) == len(names) * (len(names) - 1)
    covered = np.zeros(found.shape)
    for number, pair in enumerate(pairs):
        own, other = pair.split("_given_")
        offset, modality = divmod(number, len(names))
        of_label = known.modality_of(batch.labels) == modality
        for row, documents in enumerate(rows):
            wanted = reference(documents, known, own, other)
            for place, one in zip(places[row], wanted, strict=True):
                part = slice(place.start, place.start + len(one))
                assert (found[offset, row, part] * of_label[row, part]).tolist() == one
                covered[offset, row, part] += one
    assert (covered == found).all(), "padding and other documents count nowhere"


def test_ends_and_begins_are_neither_text_nor_a_condition() -> None:
    """`</s>` after an image is not text given the image; an image after `<s>` alone is not given text."""
    known = vocabulary("text", "image")
    caption_last = np.array([BOS, BOI, IMAGE, IMAGE, EOI, TEXT, TEXT, EOS])
    image_last = np.array([BOS, TEXT, BOI, IMAGE, IMAGE, EOI, EOS])
    batch, _ = pack_rows([[caption_last], [image_last]], vocabulary=known, seq_length=8)
    (found,) = conditional_labels(batch, known)
    assert found.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]


def test_a_chart_for_each_pair() -> None:
    class Columns:
        routes = True
        columns = (
            "loss/text",
            "eval/conditional_loss/text_given_image",
            "eval/causal/conditional_loss/image_given_text",
        )

    first, second = _Builder(["run"], [Columns()])._conditional()  # type: ignore[list-item]
    assert [line.key for line in (*first.lines, *second.lines)] == list(Columns.columns[1:])
    assert first.title == "Loss per token: text given image"
