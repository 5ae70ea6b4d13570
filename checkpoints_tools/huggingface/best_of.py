"""Draws several samples of each prompt and keeps those after which the model finds the prompt most likely.

`mmscale sample --best-of N`. shipped/likelihood_moma.py has the documents in which the prompt follows its drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from checkpoints_tools.huggingface.generator import DecodedSample, Generator
from checkpoints_tools.huggingface.prompts import Prompt, refuse_unknown_characters
from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind, log_likelihoods
from mmscale.data.documents.schema import article
from mmscale.errors import DataError, UsageError
from mmscale.inference.generate import Sampling


def best_samples(
    opened: Generator,
    prompts: Sequence[Prompt],
    *,
    count: int,
    best_of: int,
    captions: Sequence[str] = (),
    sampling: Sampling,
) -> list[DecodedSample]:
    """Continue every prompt `count` times; each sample is the best of `best_of`, with its likelihood.

    Of equally likely samples the first is kept.

    Args:
        opened: the model.
        prompts: each ends with the begin token of an item.
        count: samples of each prompt.
        best_of: number of samples from which one is kept.
        captions: of each prompt, a text that follows its drawing in the training data; none: the prompt itself.
        sampling: how tokens are chosen.

    Raises:
        UsageError: a prompt begins no item, is a message or has no text; the numbers of captions and prompts differ.
        DataError: as `Generator.sample`; or the prompt after its drawing is longer than the model's context.
    """
    for prompt in prompts:
        _refuse_unranked(prompt, captioned=bool(captions))
    if captions and len(captions) != len(prompts):
        raise UsageError(
            f"--caption is given {len(captions)} times for {len(prompts)} prompts", remedy="give one for each prompt"
        )
    for caption in captions:
        refuse_unknown_characters(opened.processor.tokenizer, caption)
    texts: Sequence[str | None] = captions or [None] * len(prompts)
    masked, context = bool(opened.config.objective.cm3_rate), opened.config.model.seq_length
    encoded = [opened.encode(prompt) for prompt in prompts]
    for ids, prompt, text in zip(encoded, prompts, texts, strict=True):
        # An item of any tokens shows how long the document becomes, before anything is drawn.
        (rules,) = (one for one in opened.rules() if one.opens == ids[-1])
        document = document_behind(
            opened.processor, ids, [rules.first] * rules.tokens + [rules.closes], masked=masked, text=text
        )
        if document is not None and len(document[0]) > context:
            raise DataError(
                f"{article(prompt.opens)} and its prompt behind it have {len(document[0])} tokens, the model's context "
                f"is {context}",
                remedy="shorten the prompt, or leave --best-of away",
            )
    drawn = opened.sample(prompts, count=count * best_of, sampling=sampling)
    owners = [row for row in range(len(prompts)) for _ in range(count * best_of)]
    documents = [
        document_behind(opened.processor, encoded[row], one.ids, masked=masked, text=texts[row])
        for row, one in zip(owners, drawn, strict=True)
    ]
    likelihoods = log_likelihoods(opened.model, documents, pad=opened.processor.tokenizer.pad_token_id)
    kept = []
    for first in range(0, len(drawn), best_of):
        best = max(range(first, first + best_of), key=lambda number: likelihoods[number])
        kept.append(replace(drawn[best], likelihood=likelihoods[best]))
    return kept


def _refuse_unranked(prompt: Prompt, *, captioned: bool) -> None:
    if not prompt.opens:
        raise UsageError(
            "--best-of ranks drawn items, and nothing says that one follows the prompt",
            remedy="add --draw, or --begin MODALITY",
        )
    if prompt.chat:
        raise UsageError("--best-of: not with --chat", remedy="leave one of them away")
    if not captioned and not prompt.text.strip():
        raise UsageError(
            "--best-of ranks by how likely the prompt is, and a prompt has no text", remedy="give a text, or --caption"
        )
