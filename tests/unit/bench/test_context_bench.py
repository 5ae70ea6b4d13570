"""`mmscale bench context`: shares that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.bench import context
from mmscale.bench.context import SPLITS, render, run
from mmscale.bench.corpus import Corpus
from mmscale.errors import UsageError


def corpus(*lengths: int, image: int = 0) -> Corpus:
    """Documents of these lengths; the first begins with an image of so many tokens."""
    counts = np.array([[n, 0] for n in lengths])
    counts[0] = lengths[0] - image, image
    images = 1 if image else 0
    return Corpus(counts, np.zeros(images, np.int64), np.zeros(images, np.int64), np.full(images, image))


@pytest.mark.parametrize(
    ("split", "documents", "attention"),
    [
        # One document of 8 tokens: its tokens attend to 1, 2, ..., 8 keys, 36 in all.
        ("contiguous", (8,), 2 * (5 + 6 + 7 + 8) / 36),
        ("zig-zag of the sequence", (8,), 1.0),
        ("zig-zag of each document", (8,), 1.0),
        # Two of 4 tokens: the halves of the sequence are equal, and so are those of each document.
        ("contiguous", (4, 4), 1.0),
        ("zig-zag of the sequence", (4, 4), 2 * (1 + 2 + 3 + 4) / 20),
        ("zig-zag of each document", (4, 4), 1.0),
        # The end of a long document falls into one rank's piece.
        ("contiguous", (4,), 2.0),
    ],
)
def test_shares_of_two_ranks(
    monkeypatch: pytest.MonkeyPatch, split: str, documents: tuple[int, ...], attention: float
) -> None:
    monkeypatch.setattr(context, "synthetic_corpus", lambda **_: corpus(*documents, image=2))
    result = run(seq_length=8, sizes=(2,), sequences=1)
    row = next(row for row in result["rows"] if row["split"] == split)
    assert row["attention"]["median"] == pytest.approx(attention)
    if split == "contiguous":
        assert row["image"]["median"] == 2.0  # both tokens of the image stand at the begin
    assert row["padding"] == 0


def test_padding_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "synthetic_corpus", lambda **_: corpus(5, 3))
    result = run(seq_length=16, sizes=(2,), sequences=1)
    assert result["rows"][0]["padding"] == (3 + 1) / 16 and result["rows"][0]["image"] is None
    assert "| - |" in render(result)


def test_our_split_is_even_on_the_corpus() -> None:
    result = run(documents=600, seq_length=4096, sizes=(2, 4), sequences=20)
    assert len(result["rows"]) == 2 * len(SPLITS)
    for row in result["rows"]:
        even = row["split"] == "zig-zag of each document"
        assert (row["attention"]["p95"] < 1.02) == even, row
    assert render(result).count("\n") == 3 + 2 * len(SPLITS)


@pytest.mark.parametrize(
    ("options", "said"), [({"documents": 10}, "are wanted"), ({"seq_length": 100, "sizes": (8,)}, "cannot share")]
)
def test_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(**options)  # type: ignore[arg-type]
