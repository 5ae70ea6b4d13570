"""Token-by-token generation of text and images with a causal transformers model, for runs and exports.

It works on ids. transformers' `generate` provides the loop with its cache, and sampling. This module adds what
mixed-modal sequences need: rows of different lengths with separate limits, and images and other items that start only
if there is room for all of them. Logits processors from the caller keep items whole and strengthen the prompt.
checkpoints_tools/huggingface/generator.py provides tokenizers and models.

Shapes: B rows, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from mmscale.data.documents.schema import article
from mmscale.data.vocab import BOI, BOS, EOI, EOS, PAD
from mmscale.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides logits; 0: always the most likely token.
        top_k: choose among this number of the most likely tokens; 0: among all.
        top_p: choose among the most likely tokens up to this probability.
        guidance: classifier-free guidance for images and other items: 1 samples from the prompt's distribution, larger
            values move away from the distribution without the prompt. Needs a second pass of the model for every token
            of an item.
        cd_k, cd_alpha: contrastive decoding (CD-K) for items, instead of guidance: among the tokens with at least
            cd_alpha times the cd_k-th largest probability, the difference of log-probabilities with and without the
            prompt. 0: none. Needs a second pass too.
        unconditional: what stands for the prompt in the second pass: "none", or "mask" for the hole `<mask:0>`.
        max_tokens: longest continuation [tokens]; None: limited by the context only.
        seed: of the sampling.
        batch: rows that are computed at once.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    cd_k: int = 0
    cd_alpha: float = 0.1
    unconditional: str = "none"
    max_tokens: int | None = None
    seed: int = 0
    batch: int = 64


@dataclass(frozen=True)
class PromptStrength:
    """Logits processors that strengthen the effect of the prompt on an item.

    Attributes:
        first: compare complete distributions, so they come before tokens are excluded.
        last: compare those over the tokens that are left.
    """

    first: tuple[LogitsProcessor, ...] = ()
    last: tuple[LogitsProcessor, ...] = ()


@dataclass(frozen=True)
class ItemRules:
    """Properties of a modality that generation needs; its items are between a begin and an end token.

    Attributes:
        name: of the modality.
        first, end: half-open range of its tokens.
        tokens: of an item, between its begin and end token.
        opens, closes: ids of the begin and the end token.
        grammar: keeps items complete: the begin token, that many tokens, the end token, and no such token anywhere
            else.
        strength: makes the processors of a sampling, given the model and whether to use a cache. Rows of a batch may
            begin items at any time.
    """

    name: str
    first: int
    end: int
    tokens: int
    opens: int
    closes: int
    grammar: LogitsProcessor
    strength: Callable[[Any, Sampling, bool], PromptStrength]


@dataclass(frozen=True)
class Continuation:
    """The text and images generated for one prompt.

    Attributes:
        ids: without the prompt, and without `</s>`.
        ended: by `</s>`; otherwise the limit was reached.
    """

    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    items: Sequence[ItemRules],
    context: int,
    never: Sequence[int] = (),
    ends: Sequence[int] = (EOS,),
    use_cache: bool = True,
    grammars: Sequence[LogitsProcessor] = (),
) -> list[Continuation]:
    """Continue every prompt until a token that ends it, or its limit.

    Args:
        model: a causal language model of transformers in evaluation mode.
        prompts: ids of each, `<s>` first; one may end with the begin token of an item.
        sampling: how tokens are chosen.
        items: the modalities that may be generated; `<boi>` and `<eoi>` are excluded if image is not among them.
        context: longest sequence that the model was trained on [tokens].
        never: further ids that are never generated: padding of the vocabulary.
        ends: ids that end a continuation.
        use_cache: without it every token needs a pass over the whole sequence; the result is the same.
        grammars: further restrictions of the tokens.

    Raises:
        DataError: a prompt leaves no room for a continuation, or for the item that it begins.
    """
    limits = [_limit(prompt, sampling, items, context) for prompt in prompts]
    found: list[Continuation] = []
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        for start in range(0, len(prompts), sampling.batch):
            rows = slice(start, start + sampling.batch)
            found += _batch(model, prompts[rows], limits[rows], sampling, items, never, ends, use_cache, grammars)
    return found


def _limit(prompt: Sequence[int], sampling: Sampling, items: Sequence[ItemRules], context: int) -> int:
    """Longest continuation of a prompt [tokens]."""
    room = context - len(prompt)
    if room < 1:
        raise DataError(
            f"a prompt has {len(prompt)} tokens, the model's context is {context}", remedy="shorten the prompt"
        )
    limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    for item in items:
        if prompt[-1] == item.opens and limit <= item.tokens:
            where = "context has room" if limit == room else "limit of new tokens is"
            raise DataError(
                f"a prompt of {len(prompt)} tokens begins {article(item.name)} of {item.tokens} + 1, the {where} for "
                f"{limit}",
                remedy="shorten the prompt" if limit == room else f"--max-tokens {item.tokens + 1} or more",
            )
    return limit


def _batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    items: Sequence[ItemRules],
    never: Sequence[int],
    stops: Sequence[int],
    use_cache: bool,
    grammars: Sequence[LogitsProcessor],
) -> list[Continuation]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor(limits, device=ids.device) + width
    # Temperature, top-k and top-p come last (transformers adds them) and apply to the remaining tokens.
    strengths = [item.strength(model, sampling, use_cache) for item in items]
    processors = [one for strength in strengths for one in strength.first]
    for item in items:
        processors += [item.grammar, RoomForItems(item, ends)]
    processors += grammars
    closed = () if any(item.opens == BOI for item in items) else (BOI, EOI)
    processors.append(SuppressTokensLogitsProcessor([PAD, BOS, *closed, *never], device=str(ids.device)))
    processors += [one for strength in strengths for one in strength.last]
    greedy = sampling.temperature == 0.0
    chosen = {} if greedy else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    out = model.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=max(limits),
            use_cache=use_cache,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=list(stops),
            **chosen,
        ),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([RowLimits(ends)]),
    )
    return [_continuation(row[width:], limit, stops) for row, limit in zip(out.tolist(), limits, strict=True)]


def _continuation(ids: list[int], limit: int, ends: Sequence[int]) -> Continuation:
    own = ids[:limit]
    end = next((place for place, token in enumerate(own) if token in ends), None)
    return Continuation(tuple(own[:end]), end is not None)


class RowLimits(StoppingCriteria):
    """Stops every row at its own column.

    Args:
        ends: [B], number of columns.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """[B] bool: done."""
        return self.ends <= input_ids.shape[1]


class RoomForItems(LogitsProcessor):
    """Allows an item to start only if its row has room for all of it.

    Args:
        item: how long one is.
        ends: [B], number of columns of each row.
    """

    def __init__(self, item: ItemRules, ends: Tensor) -> None:
        self.least = item.tokens + 2
        self.opens = item.opens
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [B, V] with the begin token at -inf in rows without enough room."""
        late = self.ends - input_ids.shape[1] < self.least
        scores = scores.clone()
        scores[:, self.opens] = scores[:, self.opens].masked_fill(late, float("-inf"))
        return scores
