# Small prepared data sets for tests of the read side, written with megatron's own builder.
# It does not use `mmscale data prepare`: the two sides meet only in the format on disk.
"""Prepared data sets for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from mmscale.data.prepared.manifest import FORMAT, Manifest, Part, Split, write_manifest
from mmscale.data.vocab import BOI, BOS, EOI, EOS, Vocabulary

VOCABULARY = Vocabulary(("text", "image"), ((0, 100), (100, 132)))
THREE = Vocabulary(("text", "image", "speech"), ((0, 100), (100, 132), (132, 150)))
# Settings of tests that only read data: the ranges of VOCABULARY, and a model that is never built.
VOCAB = {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 32}], "pad_multiple": 4}
SMALL_MODEL = {"kind": "dense", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
IMAGE_TOKENS = 16
_DIGITS = range(5, 55)  # text ids that spell a document's number

Tokens = NDArray[np.int64]


def document(
    number: int, *, text: int, images: int = 0, rng: np.random.Generator, image_tokens: int = IMAGE_TOKENS
) -> Tokens:
    """BOS, the document's number, text, images between BOI and EOI, EOS."""
    head = [BOS, _DIGITS[number // 2500], _DIGITS[number // 50 % 50], _DIGITS[number % 50]]
    parts = [np.array(head), rng.integers(55, 100, text)]
    for _ in range(images):
        parts += [np.array([BOI]), rng.integers(100, 132, image_tokens), np.array([EOI])]
    return np.concatenate([*parts, np.array([EOS])]).astype(np.int64)


def corpus(count: int, *, seed: int = 0, longest_text: int = 40) -> list[Tokens]:
    """Half text only, half with one to three images."""
    rng = np.random.default_rng(seed)
    return [
        document(n, text=int(rng.integers(0, longest_text)), images=int(rng.integers(1, 4)) if n % 2 else 0, rng=rng)
        for n in range(count)
    ]


def prepare(
    folder: Path,
    documents: Sequence[Tokens],
    *,
    vocabulary: Vocabulary = VOCABULARY,
    loss: Sequence[int] | None = None,
    parts: int = 2,
    split: str = "train",
) -> Path:
    """Write documents as a prepared data set and return its folder.

    Args:
        folder: where to.
        documents: token ids.
        vocabulary: id ranges.
        loss: loss bits of each document; default: all modalities.
        parts: number of parts.
        split: the split's name; the other split is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = vocabulary.names
    bits = loss if loss is not None else [(1 << len(names)) - 1] * len(documents)
    written = []
    for number, chosen in enumerate(np.array_split(np.arange(len(documents)), parts)):
        prefix = f"{split}-{number:05d}"
        builder = IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=np.uint16)
        table = np.zeros((len(chosen), len(names) + 1), np.int64)
        for row, index in enumerate(chosen):
            ids = documents[index]
            builder.add_document(ids, [len(ids)])
            modality = vocabulary.modality_of(ids)
            table[row, :-1] = [(modality == m).sum() for m in range(len(names))]
            table[row, -1] = bits[index]
        builder.finalize(str(folder / f"{prefix}.idx"))
        np.save(folder / f"{prefix}.meta.npy", table)
        written.append(
            Part(
                prefix=prefix,
                documents=len(chosen),
                tokens={name: int(table[:, m].sum()) for m, name in enumerate(names)},
                bin_bytes=(folder / f"{prefix}.bin").stat().st_size,
                idx_bytes=(folder / f"{prefix}.idx").stat().st_size,
            )
        )
    other = {"train": "validation", "validation": "train"}[split]
    manifest = Manifest(
        format=FORMAT,
        modalities=names,
        ranges=vocabulary.ranges,
        vocabulary=vocabulary.fingerprint,
        tokenizers={"text": "none"},
        tokens_per_item={"image": IMAGE_TOKENS},
        splits={split: Split(parts=tuple(written)), other: Split(parts=())},
    )
    write_manifest(folder, manifest)
    return folder
