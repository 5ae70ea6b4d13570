"""What packing and dealing are worth: padding, cut images, spread of the image share, wasted slots, documents/s.

Compares concat-and-chunk (megatron's GPTDataset), best-fit packing, and best-fit packing dealt into micro-batches.
It times this machine's CPU; it trains nothing.

    python -m mmscale.bench.data
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.manifest import FORMAT, Manifest, Part, Split, write_manifest
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.packing import Purpose, deal, pack_epoch, permutation
from mmscale.data.source import Source
from mmscale.data.vocab import BOI, EOI, Vocabulary

IMAGE_TOKENS = 1024  # Chameleon's; BOI and EOI come on top and count as text
VOCABULARY = Vocabulary(("text", "image"), ((0, 57_344), (57_344, 65_536)))
_TEXT_ID = 1000


@dataclass(frozen=True, eq=False)
class Corpus:
    """Lengths of documents and places of their images; D documents, I images.

    Attributes:
        counts: text and image tokens of each document, int64 [D, 2].
        image_document: document of each image, ascending, int64 [I].
        image_start: first token of each image inside its document, int64 [I].
        image_tokens: tokens of each image, int64 [I].
    """

    counts: NDArray[np.int64]
    image_document: NDArray[np.int64]
    image_start: NDArray[np.int64]
    image_tokens: NDArray[np.int64]


def synthetic_corpus(*, documents: int = 150_000, seq_length: int = 4096, seed: int = 0) -> Corpus:
    """Half text only (log-normal lengths), 42 % captions with an image, 8 % interleaved with 1 to 3 images.

    About half of the tokens are image tokens. A stand-in: measure your own data with `run(config)`.
    """
    rng = np.random.default_rng(seed)
    kind = rng.random(documents)
    images = np.where(kind < 0.5, 0, np.where(kind < 0.92, 1, rng.integers(1, 4, documents)))
    image = images * IMAGE_TOKENS
    text = np.select(
        [kind < 0.5, kind < 0.92],
        [rng.lognormal(6.4, 1.1, documents), rng.lognormal(3.7, 0.5, documents)],
        rng.lognormal(6.0, 0.5, documents),
    )
    text = np.clip(text.astype(np.int64) + 2 + 2 * images, 8 + 2 * images, seq_length - image)
    document = np.repeat(np.arange(documents), images)
    which = np.arange(len(document)) - np.repeat(np.cumsum(images) - images, images)
    # Text is spread evenly before, between and behind the images; a caption stands before its image.
    gap = np.where(kind < 0.92, text - 3, text // (images + 1))[document]
    start = (which + 1) * gap + which * IMAGE_TOKENS
    return Corpus(np.stack([text, image], axis=1), document, start, np.full(len(document), IMAGE_TOKENS))


def corpus_of(source: Source, vocabulary: Vocabulary) -> Corpus:
    """Lengths and images of prepared data; reads all tokens.

    An image is a run of tokens of any modality but the first.
    """
    found = []
    for begin in range(0, len(source), 4096):
        documents = np.arange(begin, min(begin + 4096, len(source)))
        inside = np.concatenate([[False], vocabulary.modality_of(source.read(documents)) > 0, [False]])
        ends = np.cumsum(source.lengths[documents], dtype=np.int64)
        first, last = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(~inside[1:] & inside[:-1])
        of = np.searchsorted(ends, first, side="right")
        found.append(np.stack([begin + of, first - (ends - source.lengths[documents])[of], last - first]))
    document, start, tokens = np.concatenate(found, axis=1)
    counts = source.counts.astype(np.int64)
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
    """Spread of the image share, and what static capacities of the corpus' mean shares lose."""
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


def _write(folder: Path, corpus: Corpus) -> None:
    """The synthetic corpus as a prepared data set: one id for text, one for images."""
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    first = np.searchsorted(corpus.image_document, np.arange(len(corpus.counts) + 1))
    for document, length in enumerate(corpus.counts.sum(axis=1).tolist()):
        ids = np.full(length, _TEXT_ID, np.uint16)
        for image in range(first[document], first[document + 1]):
            start, tokens = int(corpus.image_start[image]), int(corpus.image_tokens[image])
            ids[start - 1], ids[start : start + tokens], ids[start + tokens] = BOI, VOCABULARY.ranges[1][0], EOI
        builder.add_document(ids, [length])
    builder.finalize(str(folder / "train.idx"))
    np.save(folder / "train.meta.npy", np.column_stack([corpus.counts, np.full(len(corpus.counts), 3)]))
    part = Part(
        prefix="train",
        documents=len(corpus.counts),
        tokens=dict(zip(VOCABULARY.names, corpus.counts.sum(axis=0).tolist(), strict=True)),
        bin_bytes=(folder / "train.bin").stat().st_size,
        idx_bytes=(folder / "train.idx").stat().st_size,
    )
    manifest = Manifest(
        format=FORMAT,
        modalities=VOCABULARY.names,
        ranges=VOCABULARY.ranges,
        vocabulary=VOCABULARY.fingerprint,
        text_tokenizer="none",
        image_tokenizer="none",
        tokens_per_image=IMAGE_TOKENS,
        splits={"train": Split(parts=(part,))},
    )
    write_manifest(folder, manifest)


def _reading(mixture: Mixture, micro_batches: int) -> dict[str, float]:
    """Milliseconds of making one micro-batch, its window being dealt already."""
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
        documents: documents of the synthetic corpus.
        seq_length: tokens of a sequence, without a config.
        micro_batch_sizes: sizes to compare [sequences].
        seed: seed of the orders.
        repeats: timed repetitions.
        micro_batches: micro-batches to read for the last timing.

    Returns:
        For each scheme: padding, images_cut (fractions), per micro-batch size the spread of the image share and the
        waste of static capacities, and documents_per_second (min, median, max); and read_ms of one micro-batch.
    """
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
            _write(Path(folder), synthetic_corpus(documents=min(documents, 8000), seq_length=seq_length))
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
