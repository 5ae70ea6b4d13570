"""How evenly a split of sequences over context-parallel ranks divides their work, and the cost of its padding.

It counts, on packed sequences of the synthetic corpus of `mmscale bench data`: pairs of query and key in causal
attention inside documents, and image tokens. It trains nothing.

    mmscale bench context --seq-length 32768
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.bench.corpus import Corpus, synthetic_corpus
from mmscale.data.stream.context_rows import zigzag
from mmscale.data.stream.packing import pack_epoch, padded_lengths
from mmscale.errors import UsageError

_WINDOW = 8192  # documents among which packing chooses, as data.pack_window


def _contiguous(documents: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    return np.tile(np.arange(documents.shape[1]), (len(documents), 1))


def _sequence_zigzag(documents: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    piece = np.arange(documents.shape[1]) * 2 * size // documents.shape[1]
    return np.tile(np.argsort(np.minimum(piece, 2 * size - 1 - piece), kind="stable"), (len(documents), 1))


def _document_zigzag(documents: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    return zigzag(documents, size=size)


# Each function returns the positions of the ranks' tokens [b, s], those of rank 0 first.
SPLITS: dict[str, Callable[[NDArray[np.int32], int], NDArray[np.int64]]] = {
    "contiguous": _contiguous,
    "zig-zag of the sequence": _sequence_zigzag,
    "zig-zag of each document": _document_zigzag,
}


def run(
    *,
    documents: int = 40_000,
    seq_length: int = 4096,
    sizes: tuple[int, ...] = (2, 4, 8),
    sequences: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the ways to split sequences.

    Args:
        documents: of the corpus.
        seq_length: tokens of a sequence.
        sizes: context-parallel ranks.
        sequences: number of sequences to measure.
        seed: of the corpus and its order.

    Returns:
        `sequences`, `seq_length`, `documents_per_sequence`, and `rows`: one for each of `sizes` and way to split, with
        `size`, `split`, `padding` (additional share of padding, because every document is padded to a multiple of
        2 * size), and `attention`, `image` and `tokens`: the largest rank's share times the number of ranks, as
        {median, p95} over sequences, without padding. `image` only covers sequences with images, None if there are
        none.

    Raises:
        UsageError: there are too few documents, or 2 * size does not divide seq_length.
    """
    for size in sizes:
        if seq_length % (2 * size):
            raise UsageError(
                f"bench context: {size} ranks cannot share {seq_length} tokens in zig-zag",
                remedy=f"give a --seq-length that {2 * size} divides",
            )
    corpus = synthetic_corpus(documents=documents, seq_length=seq_length, seed=seed)
    rows, held = [], 0.0
    for size in sizes:
        layout = _Layout(corpus, seq_length=seq_length, multiple=2 * size, sequences=sequences, seed=seed)
        held = layout.documents_per_sequence
        rows += [
            {
                "size": size,
                "split": name,
                "padding": layout.padding,
                **layout.shares(split(layout.documents, size), size),
            }
            for name, split in SPLITS.items()
        ]
    return {"sequences": sequences, "seq_length": seq_length, "documents_per_sequence": held, "rows": rows}


class _Layout:
    """Packed sequences, token by token.

    Attributes:
        documents: number of each token's document inside its sequence; padding at the end counts as one, [b, s].
        padding: share of the tokens that is padding of documents.
        documents_per_sequence: their mean.
    """

    def __init__(self, corpus: Corpus, *, seq_length: int, multiple: int, sequences: int, seed: int) -> None:
        lengths = corpus.counts.sum(axis=1)
        packing = pack_epoch(
            lengths, seq_length=seq_length, window=_WINDOW, seed=seed, source=0, epoch=0, multiple=multiple
        )
        if len(packing) < sequences:
            raise UsageError(
                f"bench context: {len(lengths)} documents fill {len(packing)} sequences, {sequences} are wanted",
                remedy="give more --documents, or fewer --sequences",
            )
        self.documents = np.zeros((sequences, seq_length), np.int32)
        self._work = np.zeros((sequences, seq_length), np.int64)  # keys that each token attends to
        self._image = np.zeros((sequences, seq_length), bool)
        first_image = np.searchsorted(corpus.image_document, np.arange(len(lengths) + 1))
        padded = padded_lengths(lengths, multiple)
        for row in range(sequences):
            at = 0
            own = packing.documents[packing.starts[row] : packing.starts[row + 1]]
            for number, document in enumerate(own):
                length = lengths[document]
                self.documents[row, at : at + padded[document]] = number
                self._work[row, at : at + length] = np.arange(1, length + 1)
                for image in range(first_image[document], first_image[document + 1]):
                    start = at + corpus.image_start[image]
                    self._image[row, start : start + corpus.image_tokens[image]] = True
                at += padded[document]
            self.documents[row, at:] = len(own)
        used = packing.documents[: packing.starts[sequences]]
        self.padding = float((padded[used] - lengths[used]).sum() / self.documents.size)
        self.documents_per_sequence = len(used) / sequences

    def shares(self, order: NDArray[np.int64], size: int) -> dict[str, dict[str, float] | None]:
        """The fullest rank's share times the number of ranks: 1 is even.

        Args:
            order: positions of the ranks' tokens [b, s], those of rank 0 first.
            size: ranks.
        """
        return {
            "attention": _fullest(self._work, order, size),
            "image": _fullest(self._image, order, size),
            "tokens": _fullest(self._work > 0, order, size),
        }


def _fullest(amount: NDArray[Any], order: NDArray[np.int64], size: int) -> dict[str, float] | None:
    of_ranks = np.take_along_axis(amount, order, axis=1).reshape(len(order), size, -1).sum(axis=2)
    total = of_ranks.sum(axis=1)
    if not total.any():
        return None
    fullest = (of_ranks.max(axis=1) * size)[total > 0] / total[total > 0]
    return {"median": float(np.median(fullest)), "p95": float(np.percentile(fullest, 95))}


def render(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"{result['sequences']} sequences of {result['seq_length']:,} tokens, "
        f"{result['documents_per_sequence']:.1f} documents each; fullest rank over the mean, median (95th percentile)",
        "",
        "| cp | split | attention | image tokens | all tokens | padding of documents |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        found = (row[key] for key in ("attention", "image", "tokens"))
        cells = [f"{share['median']:.2f} ({share['p95']:.2f})" if share else "-" for share in found]
        padding = f"{row['padding']:.2%}" if row["split"] == "zig-zag of each document" else "not needed"
        lines.append(f"| {row['size']} | {row['split']} | {' | '.join(cells)} | {padding} |")
    return "\n".join(lines)
