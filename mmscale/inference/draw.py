"""Generates images or other items for text prompts with batch routing, token by token (`mmscale sample`).

With batch routing experts choose among all tokens of a sequence, so a prompt alone would be routed unlike any training
sequence: every expert would take every token. Each prompt is therefore placed at the end of a sequence of real held-out
documents, which compete for experts as in training. Causal routing needs auxiliary routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.data.documents.schema import article
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import open_codecs
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.manifest import HELD_OUT, most_complete, read_blend
from mmscale.data.stream.packed import pack_rows
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOS, IMAGE, PAD
from mmscale.errors import DataError
from mmscale.inference.model import RunModel


@dataclass(frozen=True)
class Drawing:
    """Items generated for one prompt.

    Attributes:
        prompt: the text.
        modality: of the items.
        items: decoded by its tokenizer; images are uint8 [height, width, channels].
        codec: the tokenizer.
    """

    prompt: str
    modality: str
    items: list[NDArray[Any]]
    codec: Codec


def draw(
    model: RunModel,
    prompts: Sequence[str],
    *,
    count: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    modality: str = IMAGE,
) -> list[Drawing]:
    """Generate `count` images for every prompt.

    Args:
        model: a loaded run.
        prompts: texts as in training documents before an image, e.g. "draw a seven".
        count: images per prompt.
        temperature: divides logits; 0: always the most likely code.
        seed: of the sampling.
        top_p: keep the most likely codes up to this probability.
        modality: of the items.

    Raises:
        DataError: a prompt is too long for a sequence, or the data set has no such items.
    """
    blend = read_blend(model.config)
    folder = most_complete(blend)
    assert folder is not None
    manifest = blend[folder]
    text, codec = open_text_tokenizer(folder), open_codecs(folder).get(modality)
    marks = model.vocabulary.marks(modality)
    if codec is None or marks is None:
        raise DataError(
            f"data: {folder} has no {modality} tokenizer", remedy=f"prepare it from documents with {modality}s"
        )
    length, codes = model.config.model.seq_length, manifest.tokens_per_item[modality]
    low, _ = model.vocabulary.range_of(modality)
    high = low + codec.vocab_size  # a small data set has fewer codes than the range has ids
    starts = [
        np.array([BOS, *text.encode(prompt), marks[0]], dtype=np.int64) for prompt in prompts for _ in range(count)
    ]
    for prompt, ids in zip(prompts, starts[::count], strict=True):
        if len(ids) + codes > length:
            raise DataError(
                f"prompt {prompt!r} and {article(modality)} take {len(ids) + codes} tokens, a sequence has {length}",
                remedy="shorten the prompt",
            )
    generator = torch.Generator().manual_seed(seed)
    companions = _companions(folder, model, [length - len(ids) - codes for ids in starts])
    drawn = np.full((len(starts), codes), PAD, dtype=np.int64)
    for number in range(codes):
        rows = [
            [*others, np.concatenate((ids, drawn[i, :number]))]
            for i, (ids, others) in enumerate(zip(starts, companions, strict=True))
        ]
        batch, places = pack_rows(rows, vocabulary=model.vocabulary, seq_length=length)
        logits = model.logits(batch)[:, :, low:high]
        last = torch.stack([logits[i, places[i][-1].start + len(rows[i][-1]) - 1] for i in range(len(rows))])
        drawn[:, number] = low + _choose(last, temperature=temperature, top_p=top_p, generator=generator).numpy()
    made = codec.decode(drawn - low)
    return [
        Drawing(prompt, modality, list(made[i * count : (i + 1) * count]), codec) for i, prompt in enumerate(prompts)
    ]


def _choose(logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """[rows, codes] -> [rows]."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    ordered, index = probabilities.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0.0
    picked = torch.multinomial(ordered, 1, generator=generator)
    return index.gather(-1, picked).squeeze(-1)


def _companions(folder: Path, model: RunModel, room: Sequence[int]) -> list[list[NDArray[np.int64]]]:
    """Held-out documents for each row, one after another, as many as fit."""
    source = Source(folder, split=HELD_OUT, vocabulary=model.vocabulary)
    rows: list[list[NDArray[np.int64]]] = []
    number = 0
    for left in room:
        row: list[NDArray[np.int64]] = []
        while source.rows(following := np.array([number % len(source)])).lengths[0] <= left:
            ids = source.read(following)
            row.append(ids)
            left -= len(ids)
            number += 1
        rows.append(row)
    return rows
