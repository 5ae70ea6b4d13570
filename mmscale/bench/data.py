"""Compares packing schemes: padding, cut images, spread of the image share, wasted slots, documents/s.

Concat-and-chunk (megatron's GPTDataset), best-fit packing, and best-fit packing dealt into micro-batches. It times this
machine's CPU; it trains nothing.

    python -m mmscale.bench.data
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.bench import data_start
from mmscale.bench.corpus import VOCABULARY, Corpus, synthetic_corpus, write_corpus
from mmscale.config import Config
from mmscale.data.prepared.table_facts import LARGE
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.packing import Purpose, deal, pack_epoch, permutation
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary


def corpus_of(source: Source, vocabulary: Vocabulary) -> Corpus:
    """Lengths and images of prepared data; reads all tokens.

    An image is a run of tokens of any modality but the first.
    """
    found = []
    counts = np.empty((len(source), len(vocabulary.names)), np.int64)
    for begin in range(0, len(source), 4096):
        documents = np.arange(begin, min(begin + 4096, len(source)))
        rows = source.rows(documents)
        counts[documents] = rows.counts
        inside = np.concatenate([[False], vocabulary.modality_of(source.read(documents)) > 0, [False]])
        ends = np.cumsum(rows.lengths)
        first, last = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(~inside[1:] & inside[:-1])
        of = np.searchsorted(ends, first, side="right")
        found.append(np.stack([begin + of, first - (ends - rows.lengths)[of], last - first]))
    document, start, tokens = np.concatenate(found, axis=1)
    return Corpus(np.stack([counts[:, 0], counts[:, 1:].sum(axis=1)], axis=1), document, start, tokens)


def concat_and_chunk(corpus: Corpus, *, seq_length: int, seed: int) -> tuple[NDArray[np.int64], int]:
    """Shuffle documents, join them, cut every seq_length tokens: counts of each sequence [N, 2], and images cut."""
    lengths = corpus.counts.sum(axis=1)
    order = permutation(len(lengths), seed=seed, source=0, purpose=Purpose.DOCUMENTS, number=0)
    offset = np.empty_like(lengths)
    offset[order] = np.cumsum(lengths[order]) - lengths[order]
    begin = offset[corpus.image_document] + corpus.image_start
    end = begin + corpus.image_tokens
    cut = int((begin // seq_length != (end - 1) // seq_length).sum())
    sequences = int(lengths.sum()) // seq_length
    by_place = np.argsort(begin)
    begin, end = begin[by_place], end[by_place]
    whole = np.concatenate([[0], np.cumsum(end - begin)])
    borders = np.arange(sequences + 1) * seq_length
    opened = np.searchsorted(begin, borders)
    unfinished = np.where(opened > 0, np.maximum(end[opened - 1] - borders, 0), 0)
    image = np.diff(whole[opened] - unfinished)
    counts = np.stack([seq_length - image, image], axis=1)
    order = permutation(sequences, seed=seed, source=0, purpose=Purpose.SEQUENCES, number=0)
    return counts[order], cut


def _groups(counts: NDArray[np.int64], size: int, window: int | None) -> NDArray[np.int64]:
    """Counts of each micro-batch [G, 2], dealt in windows or, without one, of consecutive sequences."""
    counts = counts[: len(counts) // size * size]
    if window is None:
        return counts.reshape(-1, size, 2).sum(axis=1)
    window = window // size * size
    parts = (counts[begin : begin + window] for begin in range(0, len(counts), window))
    return np.concatenate([part[deal(part, group=size)].sum(axis=1) for part in parts])


def _spread(groups: NDArray[np.int64], *, slots: int) -> dict[str, float]:
    """Spread of the image share, and the loss of static capacities for the mean shares of the corpus."""
    share = groups[:, 1] / groups.sum(axis=1)
    capacity = slots * groups[:, 1].sum() / groups.sum()
    over = np.maximum(groups[:, 1] - capacity, 0).sum() / groups[:, 1].sum()
    empty = np.maximum(capacity - groups[:, 1], 0).sum() / (capacity * len(groups))
    low, high = np.percentile(share, [1, 99])
    return {
        "image_share_std": float(share.std()),
        "image_share_p1": float(low),
        "image_share_p99": float(high),
        "image_tokens_over_capacity": float(over),
        "image_slots_unused": float(empty),
    }


def _time(work: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, float]]:
    seconds, result = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return result, _summary(seconds)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}


def _reading(mixture: Mixture, micro_batches: int) -> dict[str, float]:
    """Milliseconds for making one micro-batch whose window is already dealt."""
    mixture.micro_batch(0)
    seconds = [_time(partial(mixture.micro_batch, number), 1)[1]["min"] for number in range(micro_batches)]
    return _summary([second * 1e3 for second in seconds])


def run(
    config: Config | None = None,
    *,
    documents: int = 150_000,
    seq_length: int = 4096,
    micro_batch_sizes: tuple[int, ...] = (4, 8),
    seed: int = 1,
    repeats: int = 5,
    micro_batches: int = 200,
) -> dict[str, Any]:
    """Compare the schemes on a configuration's first data set, or on the synthetic corpus.

    Args:
        config: its data set, windows and seq_length are used; None: the synthetic corpus.
        documents: documents of the synthetic corpus; with more than 1,048,576 the start of a run is measured instead
            of the schemes (`mmscale.bench.data_start`).
        seq_length: tokens of a sequence, without a config.
        micro_batch_sizes: sizes to compare [sequences].
        seed: seed of the orders.
        repeats: timed repetitions.
        micro_batches: micro-batches to read for the last timing.

    Returns:
        For each scheme: padding, images_cut (fractions), per micro-batch size the spread of the image share and the
        waste of static capacities, and documents_per_second (min, median, max); and read_ms of one micro-batch.
    """
    if config is None and documents > LARGE:
        return {"start": data_start.run(documents=documents, seq_length=seq_length, seed=seed)}
    pack_window, deal_window = 8192, 2048
    if config is not None:
        vocabulary = Vocabulary.from_config(config.vocab)
        mixture = open_mixture(config, "train", vocabulary=vocabulary)
        corpus = corpus_of(Source(Path(config.data.sources[0].path), split="train", vocabulary=vocabulary), vocabulary)
        seq_length, pack_window, deal_window = config.model.seq_length, config.data.pack_window, config.data.deal_window
        reading = _reading(mixture, micro_batches)
        batch = config.train.micro_batch_size
    else:
        corpus, batch = synthetic_corpus(documents=documents, seq_length=seq_length), 8
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), synthetic_corpus(documents=min(documents, 8000), seq_length=seq_length))
            source = Source(Path(folder), split="train", vocabulary=VOCABULARY)
            mixture = Mixture([source], VOCABULARY, seq_length=seq_length, micro_batch_size=batch, seed=seed)
            reading = _reading(mixture, micro_batches)
    lengths = corpus.counts.sum(axis=1)
    (chunked, cut), chunk_s = _time(lambda: concat_and_chunk(corpus, seq_length=seq_length, seed=seed), repeats)
    packing, pack_s = _time(
        lambda: pack_epoch(lengths, seq_length=seq_length, window=pack_window, seed=seed, source=0, epoch=0), repeats
    )
    packed = packing.sums(corpus.counts)

    def scheme(counts: NDArray[np.int64], cut: int, seconds: dict[str, float], window: int | None) -> dict[str, Any]:
        return {
            "padding": float(1 - counts.sum() / (len(counts) * seq_length)),
            "images_cut": cut / max(1, len(corpus.image_document)),
            "micro_batch": {
                size: _spread(_groups(counts, size, window), slots=size * seq_length) for size in micro_batch_sizes
            },
            "documents_per_second": {
                "min": len(lengths) / seconds["max"],
                "median": len(lengths) / seconds["median"],
                "max": len(lengths) / seconds["min"],
            },
        }

    _, deal_s = _time(lambda: _groups(packed, micro_batch_sizes[0], deal_window), repeats)
    both_s = {key: pack_s[key] + deal_s[key] for key in pack_s}
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "image_share": float(corpus.counts[:, 1].sum() / lengths.sum()),
        "seq_length": seq_length,
        "concat_and_chunk": scheme(chunked, cut, chunk_s, None),
        "best_fit": scheme(packed, 0, pack_s, None),
        "pack_then_deal": scheme(packed, 0, both_s, deal_window),
        "read_ms": {"micro_batch_size": batch, **reading},
    }


def render(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    if "start" in result:
        return data_start.render(result["start"])
    lines = [
        f"{result['documents']:,} documents, {result['tokens'] / 1e6:.0f} M tokens, {result['image_share']:.0%} of "
        f"them image tokens, sequences of {result['seq_length']}",
        "",
        "| scheme | padding | images cut | micro-batch | std of image share (p1-p99) | image tokens over capacity | "
        "image slots unused | documents/s: min / median / max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scheme in ("concat_and_chunk", "best_fit", "pack_then_deal"):
        found = result[scheme]
        speed = " / ".join(f"{found['documents_per_second'][key]:,.0f}" for key in ("min", "median", "max"))
        for size, spread in found["micro_batch"].items():
            lines.append(
                f"| {scheme} | {found['padding']:.2%} | {found['images_cut']:.1%} | {size} | "
                f"{spread['image_share_std']:.3f} ({spread['image_share_p1']:.2f}-{spread['image_share_p99']:.2f}) | "
                f"{spread['image_tokens_over_capacity']:.1%} | {spread['image_slots_unused']:.1%} | {speed} |"
            )
    read = result["read_ms"]
    lines += [
        "",
        f"one micro-batch of {read['micro_batch_size']} sequences: "
        f"{read['min']:.2f} / {read['median']:.2f} / {read['max']:.2f} ms (min / median / max)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render(run()) + "\n")
