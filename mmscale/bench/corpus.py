"""The synthetic corpus of the benchmarks of data: lengths of documents, places of their images, and token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from mmscale.data.prepared.manifest import FORMAT, Manifest, Part, Split, write_manifest
from mmscale.data.vocab import BOI, EOI, Vocabulary

IMAGE_TOKENS = 1024  # as in Chameleon, without BOI and EOI, which count as text
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

    About half of the tokens are image tokens. For real data use `run(config)`.
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
    # Text is distributed evenly before, between and after the images; a caption comes before its image.
    gap = np.where(kind < 0.92, text - 3, text // (images + 1))[document]
    start = (which + 1) * gap + which * IMAGE_TOKENS
    return Corpus(np.stack([text, image], axis=1), document, start, np.full(len(document), IMAGE_TOKENS))


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """Write the synthetic corpus as a prepared data set: one id for text, one for images."""
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
        tokenizers={"text": "none"},
        tokens_per_item={"image": IMAGE_TOKENS},
        splits={"train": Split(parts=(part,))},
    )
    write_manifest(folder, manifest)
