"""Token-by-token generation of text and images with a causal transformers model, for runs and exports.

It works on ids. transformers' `generate` provides the loop with its cache, and sampling. This module adds what
mixed-modal sequences need: rows of different lengths with separate limits, images and other items that start only if
there is room for all of them, and classifier-free guidance. Logits processors from the caller keep items whole.
checkpoints_tools/huggingface/generator.py provides tokenizers and models.

Shapes: B rows, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        max_tokens: longest continuation [tokens]; None: limited by the context only.
        seed: of the sampling.
        batch: rows that are computed at once.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    max_tokens: int | None = None
    seed: int = 0
    batch: int = 64


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
    """

    name: str
    first: int
    end: int
    tokens: int
    opens: int
    closes: int
    grammar: LogitsProcessor


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
    # Guidance compares two complete distributions, so it comes before tokens are excluded. Temperature, top-k and top-p
    # come last (transformers adds them) and apply to the remaining tokens.
    processors: list[LogitsProcessor] = []
    if sampling.guidance != 1.0:
        processors += [
            ClassifierFreeGuidance(model, item, scale=sampling.guidance, use_cache=use_cache) for item in items
        ]
    for item in items:
        processors += [item.grammar, RoomForItems(item, ends)]
    processors += grammars
    closed = () if any(item.opens == BOI for item in items) else (BOI, EOI)
    processors.append(SuppressTokensLogitsProcessor([PAD, BOS, *closed, *never], device=str(ids.device)))
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


class ClassifierFreeGuidance(LogitsProcessor):
    """Moves scores of an item's tokens away from those of the same item without its prompt.

    u + scale * (c - u) with the log-probabilities c of the row and u of `<s>`, the begin token and the item so far
    (used by Chameleon 2405.09818 and others; Ho and Salimans 2207.12598). transformers' own class runs one
    unconditional branch from the first token on. Here rows may begin items at any time. The branch has a cache in which
    a row's older columns are masked when the row begins another item, and which is dropped when no row is inside an
    item.

    Args:
        model: the same model.
        item: range and length.
        scale: 1: no change.
        use_cache: without it every token of an item needs a pass over the item so far.
    """

    def __init__(self, model: Any, item: ItemRules, *, scale: float, use_cache: bool = True) -> None:
        self.model, self.item, self.scale = model, item, scale
        self._unconditional = self._with_cache if use_cache else self._without_cache
        self._cache: Any = None
        self._seen: Tensor | None = None  # [B, columns], which columns a row attends to

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [B, V], changed in rows whose next token is an item's."""
        done = self._item_tokens(input_ids)
        drawing = (done >= 0) & (done < self.item.tokens)
        if not bool(drawing.any()):
            self._cache = self._seen = None
            return scores
        without = self._unconditional(input_ids, done, drawing).to(scores.dtype).log_softmax(dim=-1)
        guided = without + self.scale * (scores.log_softmax(dim=-1) - without)
        return torch.where(drawing.unsqueeze(1), guided, scores)

    def _item_tokens(self, ids: Tensor) -> Tensor:
        """[B]: tokens of the item that a row is in, 0 after the begin token; -1 outside of items."""
        recent = ids[:, -(self.item.tokens + 1) :]
        of_item = (recent >= self.item.first) & (recent < self.item.end)
        trailing = of_item.flip(1).long().cumprod(dim=1).sum(dim=1)
        before = (recent.shape[1] - 1 - trailing).clamp(min=0)
        begun = recent.gather(1, before.unsqueeze(1)).squeeze(1) == self.item.opens
        return torch.where(begun, trailing, -1)

    def _without_cache(self, input_ids: Tensor, done: Tensor, drawing: Tensor) -> Tensor:
        """Logits [B, V] after `<s>`, the begin token and the item so far; in rows outside of items, after `<s>`."""
        own = torch.where(drawing, done + 2, 1).unsqueeze(1)  # columns of the branch, `<s>` included
        width = int(own.max())
        from_end = torch.arange(width, 0, -1, device=input_ids.device).unsqueeze(0)
        seen = from_end <= own
        ids = torch.where(from_end == own, BOS, torch.where(seen, input_ids[:, -width:], PAD))
        positions = (own - from_end).clamp(min=0)
        out = self.model(
            input_ids=ids, attention_mask=seen.long(), position_ids=positions, use_cache=False, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _with_cache(self, input_ids: Tensor, done: Tensor, drawing: Tensor) -> Tensor:
        """The same with this branch's own cache; the values of rows outside of items have no meaning."""
        last = input_ids[:, -1]
        begins = drawing & (done == 0)
        goes_on = drawing & (done > 0)
        # A row that begins an item adds two columns, `<s>` first; the others fill the additional column with padding.
        two = bool(begins.any())
        bos = torch.where(begins, BOS, PAD)
        newest = torch.where(drawing, last, PAD)
        ids = torch.stack((bos, newest), dim=1) if two else newest.unsqueeze(1)
        position = torch.where(drawing, done + 1, 0)
        positions = torch.stack((torch.zeros_like(position), position), dim=1) if two else position.unsqueeze(1)
        # Rows outside of items attend to their new columns, because a row of a mask must not be empty.
        fresh = torch.ones_like(ids, dtype=torch.bool)
        if two:
            fresh[:, 0] = ~goes_on
        older = ids.new_zeros((len(ids), 0), dtype=torch.bool) if self._seen is None else self._seen
        self._seen = torch.cat((older & goes_on.unsqueeze(1), fresh), dim=1)
        out = self.model(
            input_ids=ids,
            attention_mask=self._seen.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits
