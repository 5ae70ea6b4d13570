"""Fills the holes of prompts with a generator's model (`mmscale sample --infill`).

The documents with holes are those of shipped/infilling_moma.py; mmscale.inference.generate generates, as for other
prompts, one hole after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from checkpoints_tools.huggingface.generator import DecodedSample, Generator
from checkpoints_tools.huggingface.prompts import Prompt, document_of, refuse_unknown_characters
from checkpoints_tools.huggingface.shipped.infilling_moma import HOLE, Holes
from mmscale.config import Config
from mmscale.errors import DataError, UsageError
from mmscale.inference.generate import Sampling, generate

PLACEHOLDER = "<hole>"
Mask = tuple[int, int, int, int]


def infill(
    opened: Generator, prompts: Sequence[Prompt], *, mask: Mask | None, count: int, sampling: Sampling
) -> list[DecodedSample]:
    """Fill the holes of every prompt `count` times. `pieces` and `ids` of the samples are whole documents.

    Args:
        opened: the model.
        prompts: texts in which each `<hole>` is a hole.
        mask: hole in the image of each prompt: x, y, width and height in tokens; None: none.
        count: samples of each prompt.
        sampling: how tokens are chosen; `max_tokens` limits each hole.

    Raises:
        UsageError: the model was not trained with causal masking, or not with such holes; there is no hole.
        DataError: an image cannot be read, a text cannot be encoded, or there is no room.
    """
    refuse_untrained(opened.config)
    found = []
    for prompt in prompts:
        holes = _holes(opened, prompt, mask)
        if mask is not None and opened.processor.codes is not None:
            _refuse_untrained_mask(opened.config, mask, tokens=opened.processor.codes.tokens)
        rows: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        ended = [True] * count
        for number in range(len(holes.sizes)):
            filled = _fill(opened, holes, number, rows, replace(sampling, seed=sampling.seed + number))
            for row, (ids, end) in enumerate(filled):
                rows[row].append(ids)
                ended[row] &= end
        for own, end in zip(rows, ended, strict=True):
            whole = holes.filled(own)[1:-1]
            found.append(DecodedSample(prompt, tuple(opened.processor.pieces(whole)), tuple(whole), end))
    return found


def _holes(opened: Generator, prompt: Prompt, mask: Mask | None) -> Holes:
    if prompt.files and opened.processor.codes is None:
        raise UsageError("this model was trained without images", remedy="leave --image and --mask away")
    refuse_unknown_characters(opened.processor.tokenizer, prompt.text.replace(PLACEHOLDER, ""))
    content: list[Any] = []
    for piece in document_of(prompt):
        if not isinstance(piece, str):
            content.append({"type": "image", "image": piece} | ({} if mask is None else {"mask": mask}))
            continue
        for number, text in enumerate(piece.split(PLACEHOLDER)):
            content += [HOLE] * (number > 0) + [text] * bool(text)
    try:
        return Holes(opened.processor, content)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"--infill: {error}",
            remedy=f"write {PLACEHOLDER} in the text, or name a part of the picture: --mask X,Y,WIDTH,HEIGHT",
        ) from None


def _fill(
    opened: Generator, holes: Holes, number: int, rows: Sequence[Sequence[Sequence[int]]], sampling: Sampling
) -> list[tuple[tuple[int, ...], bool]]:
    """What fills a hole in each row, and whether it has ended."""
    prompts, size = [holes.prompt(own) for own in rows], holes.sizes[number]
    vocab, context = opened.config.vocab, opened.config.model.seq_length
    if size is not None:
        longest = max(map(len, prompts))
        if longest + size + 1 > context:
            raise DataError(
                f"a prompt of {longest} tokens and a hole of {size} + 1 are longer than the model's context, {context}",
                remedy="shorten the prompt, or fill fewer tokens",
            )
        sampling = replace(sampling, max_tokens=size + 1)
    found = generate(
        opened.model,
        prompts,
        sampling=sampling,
        items=(),
        context=context,
        never=range(vocab.size, vocab.padded_size),
        ends=(holes.end,),
        use_cache=opened.use_cache,
        grammars=[holes.grammar(number)],
    )
    return [(one.ids, one.ended) for one in found]


def refuse_untrained(config: Config) -> None:
    """Refuse models that were not trained to fill holes.

    Raises:
        UsageError: the model is one.
    """
    if not config.vocab.reserved:
        raise UsageError(
            "--infill: the vocabulary of this model has no tokens for holes",
            remedy="train with vocab.reserved=true and objective.cm3_rate, e.g. 0.5",
        )
    if not config.objective.cm3_rate:
        raise UsageError(
            "--infill: this model was not trained to fill holes (objective.cm3_rate was 0 in all attempts)",
            remedy="train with objective.cm3_rate, e.g. 0.5",
        )


def _refuse_untrained_mask(config: Config, mask: Mask, *, tokens: int) -> None:
    """Refuse holes in images that the model has not seen in training."""
    kind = config.objective.image_spans
    if kind == "none" or (kind == "whole" and mask[2] * mask[3] != tokens):
        edge = math.isqrt(tokens)
        raise UsageError(
            f"--mask: this model was not trained to fill parts of pictures (objective.image_spans is {kind})",
            remedy="train with objective.image_spans=partial"
            + (f", or fill the whole picture: --mask 0,0,{edge},{edge}" if kind == "whole" else ""),
        )
