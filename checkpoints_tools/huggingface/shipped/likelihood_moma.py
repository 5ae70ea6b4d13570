"""How likely a prompt is after the item that was drawn for it: ranks several drawings of a prompt (best-of-n).

The model itself is the judge; no other model is needed. Shipped next to the weights.

R documents, K places from the end, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .decoding_moma import HOLE_TOKENS, has_holes, masking_rate
from .infilling_moma import END, MOST

_TOKENS = 8192  # computed at once, padding included; a longer document is computed alone


def likelihoods(processor: Any, model: Any, prompts: Any, sequences: Any, *, text: str | None = None) -> list[float]:
    """How likely the text of each prompt is after the item drawn for it [nats, negative]; -inf: none was drawn.

    Args:
        processor: of the model.
        model: an exported model.
        prompts: ids, [B, S].
        sequences: what `generate` returned for them, [B, S + new].
        text: as of `document_behind`.

    Raises:
        ValueError: as `document_behind`.
    """
    pad = processor.tokenizer.pad_token_id
    rows: list[Any] = []
    for prompt, whole in zip(prompts.tolist(), sequences.tolist(), strict=True):
        own = [token for token in prompt if token != pad]
        rows.append(document_behind(processor, own, whole[len(prompt) :], masked=masking_rate(model) > 0, text=text))
    return log_likelihoods(model, rows, pad=pad)


def document_behind(
    processor: Any, prompt: Sequence[int], ids: Sequence[int], *, masked: bool, text: str | None = None
) -> tuple[list[int], list[int]] | None:
    """A document in which the prompt's text follows the item that was drawn for it, and the places of that text.

    Without causal masking: `<s> ITEM PROMPT`. With it, each text of the prompt is a hole in its place, which is filled
    at the end: `<s> <mask:0> ITEM </s> <mask:0> PROMPT <eom>`.

    Args:
        processor: of the model.
        prompt: ids of the prompt, `<s>` first; the begin token of an item may be last.
        ids: of the continuation.
        masked: the model was trained with causal masking.
        text: another text than the prompt that follows the item, as documents of the training data have it.

    Returns:
        Ids and places; None: nothing complete was drawn.

    Raises:
        ValueError: the prompt has no text, or more texts than there are holes.
    """
    marks = {one.boi: one for one in processor.item_grammars()}
    own, drawn = list(prompt), list(ids)
    if own[-1] in marks:
        drawn.insert(0, own.pop())
    item = _first_item(drawn, marks)
    if item is None:
        return None
    begin, rest = own[0], own[1:]
    if text is not None:
        masked, rest = False, processor.encode([text], begin=False)
    runs = _text_runs(rest, marks)
    if not runs:
        raise ValueError("the prompt has no text")
    if not masked:
        places = [1 + len(item) + place for start, stop in runs for place in range(start, stop)]
        return [begin, *item, *rest], places
    if not has_holes(processor):
        raise ValueError("this model has no tokens for holes")
    if len(runs) > MOST:
        raise ValueError(f"the prompt has more than {MOST} texts")
    known = processor.tokenizer.get_vocab()
    document, before, places = [begin], 0, []
    for number, (start, stop) in enumerate(runs):
        document += [*rest[before:start], known[HOLE_TOKENS[number]]]
        before = stop
    document += [*rest[before:], *item, processor.tokenizer.eos_token_id]
    for number, (start, stop) in enumerate(runs):
        first = len(document) + 1
        document += [known[HOLE_TOKENS[number]], *rest[start:stop], known[END]]
        places += range(first, len(document))
    return document, places


def _first_item(ids: Sequence[int], marks: dict[int, Any]) -> list[int] | None:
    """The first complete item with its begin and end token."""
    for start, token in enumerate(ids):
        if token in marks:
            stop = start + marks[token].tokens + 2
            own = list(ids[start:stop])
            if len(own) == stop - start and own[-1] == marks[token].eoi:
                return own
    return None


def _text_runs(ids: Sequence[int], marks: dict[int, Any]) -> list[tuple[int, int]]:
    """Half-open places of consecutive tokens that are in no item."""
    found, start, place = [], 0, 0
    while place < len(ids):
        length = marks[ids[place]].tokens + 2 if ids[place] in marks else 0
        if length:
            found.append((start, place))
            start = place + length
        place += max(1, length)
    return [(first, end) for first, end in [*found, (start, len(ids))] if first < end]


@torch.no_grad()
def log_likelihoods(
    model: Any, documents: Sequence[tuple[Sequence[int], Sequence[int]] | None], *, pad: int
) -> list[float]:
    """Log-probability [nats] of the tokens at the given places of each document, given those before them.

    Args:
        model: a causal language model.
        documents: ids and places, none of them the first; None: the result is -inf.
        pad: id of padding.
    """
    found = [float("-inf")] * len(documents)
    there = [(number, document) for number, document in enumerate(documents) if document is not None]
    there.sort(key=lambda one: len(one[1][0]))
    while there:
        rows = 1
        while rows < len(there) and (rows + 1) * len(there[rows][1][0]) <= _TOKENS:
            rows += 1
        part, there = there[:rows], there[rows:]
        values = _scored(model, [document for _, document in part], pad)
        for (number, _), value in zip(part, values, strict=True):
            found[number] = value
    return found


def _scored(model: Any, documents: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> list[float]:
    width = max(len(ids) for ids, _ in documents)
    kept = max(len(ids) - min(places) for ids, places in documents) + 1
    ids = torch.full((len(documents), width), pad)
    mask = torch.zeros_like(ids)
    for row, (own, _) in enumerate(documents):
        ids[row, width - len(own) :] = torch.tensor(own)
        mask[row, width - len(own) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ids, mask, positions = (one.to(model.device) for one in (ids, mask, positions))
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept)
    values = []
    for row, (own, places) in enumerate(documents):
        before = torch.tensor([kept - len(own) + place - 1 for place in places], device=model.device)
        labels = torch.tensor([own[place] for place in places], device=model.device)
        scores = out.logits[row, before].float().log_softmax(dim=-1)  # [places, V]
        values.append(float(scores.gather(1, labels.unsqueeze(1)).double().sum()))
    return values


__all__ = ["document_behind", "likelihoods", "log_likelihoods"]
