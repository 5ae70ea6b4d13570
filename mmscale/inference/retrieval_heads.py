"""Finds and masks the attention heads that retrieve: those that look a token up earlier in the document and copy it.

The probe has the form of AttentionInfluence's (Hua et al. 2025, 2505.07293): pairs of keys and values, then the keys
again, each followed by its value. A head's score is its mean attention, from the place that predicts a token of a
value, to that token's first occurrence (the retrieval score of Wu et al. 2024, 2404.15574, with weights instead of the
argmax). Keys and values are random text tokens, because a run's tokenizer need not know JSON. Masked heads
contribute nothing to the output of their layer.

S tokens of a layer, B rows, H heads, G key/value heads, D width of a head, A asked tokens, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import BOS
from mmscale.errors import UsageError
from mmscale.inference.model import RunModel
from mmscale.tables.routings import Routing

_ATTENTION = "self_attention.core_attention"
_WIDTH = 4  # tokens of a key, and of a value
_PAIRS = 32  # at most, in a row
_ROWS = 32  # at least
_SEED = 0


@dataclass(frozen=True, eq=False)
class RetrievalProbe:
    """Rows of pairs, and where a value is asked for.

    Attributes:
        rows: ids [B, tokens].
        query: positions that predict a token of a value [B, A].
        source: positions of the first occurrence of that token [B, A].
    """

    rows: NDArray[np.int64]
    query: NDArray[np.int64]
    source: NDArray[np.int64]


def make_probe(model: RunModel) -> RetrievalProbe:
    """Random pairs that fit a sequence of the model.

    Raises:
        UsageError: a sequence has no room for two pairs.
    """
    pairs = min(_PAIRS, (model.config.model.seq_length - 1) // (4 * _WIDTH))
    if pairs < 2:
        raise UsageError(
            f"data score: influence needs sequences of {8 * _WIDTH + 1} tokens, the model has "
            f"{model.config.model.seq_length}",
            remedy="use another run, or another score",
        )
    vocabulary, random = model.vocabulary, np.random.Generator(np.random.Philox(key=[_SEED, 4]))
    size = model.config.train.micro_batch_size
    count = -(-_ROWS // size) * size
    start, stop = vocabulary.range_of(vocabulary.names[0])
    content = random.integers(max(start, len(vocabulary.specials)), stop, (count, pairs, 2 * _WIDTH))
    order = random.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)
    again = np.take_along_axis(content, order[:, :, None], axis=1)
    first = np.full((count, 1), BOS)
    rows = np.concatenate([first, content.reshape(count, -1), again.reshape(count, -1)], axis=1)
    inside = _WIDTH + np.arange(_WIDTH)  # places of a value in its pair
    source = 1 + (order[:, :, None] * 2 * _WIDTH + inside).reshape(count, -1)
    asked = 1 + 2 * _WIDTH * (pairs + np.arange(pairs))[:, None] + inside
    return RetrievalProbe(rows, np.tile(asked.reshape(-1) - 1, (count, 1)), source)


def retrieval_scores(model: RunModel, *, routing: Routing) -> NDArray[np.float64]:
    """Mean attention of each head to the token that it should copy, float64 [L, H].

    In a Mixture-of-Depths layer, a token that skips the layer attends to nothing.

    Raises:
        UsageError: the model's sequences are too short, or it does not support that routing.
    """
    probe, size = make_probe(model), model.config.train.micro_batch_size
    sums = torch.zeros(len(_attentions(model)), model.config.model.num_attention_heads, dtype=torch.float64)
    for first in range(0, len(probe.rows), size):
        part = slice(first, first + size)
        batch, _ = pack_rows(
            [[row] for row in probe.rows[part]],
            vocabulary=model.vocabulary,
            seq_length=model.config.model.seq_length,
        )
        at, to = torch.from_numpy(probe.query[part]), torch.from_numpy(probe.source[part])
        with _watched(model, functools.partial(_add_attention, sums, at, to)):
            model.logits(batch, routing)
    return (sums / probe.query.size).numpy()


@contextlib.contextmanager
def _watched(model: RunModel, watch: Callable[..., None]) -> Iterator[None]:
    """Inside, `watch(layer, module, arguments, keywords)` is called before each layer attends."""
    with contextlib.ExitStack() as stack:
        for layer, module in enumerate(_attentions(model)):
            hook = module.register_forward_pre_hook(functools.partial(watch, layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _add_attention(
    sums: Tensor, at: Tensor, to: Tensor, layer: int, module: nn.Module, arguments: Any, keywords: Any
) -> None:
    """Add the attention of a layer's heads to its row of `sums` [L, H]; `at` and `to` as of `_attention_to`."""
    scale = getattr(module, "softmax_scale", None)
    found = _attention_to(arguments[0], arguments[1], keywords["packed_seq_params"], at, to, scale=scale)
    sums[layer] += found.double().cpu()


def _attention_to(query: Tensor, key: Tensor, params: Any, at: Tensor, to: Tensor, *, scale: float | None) -> Tensor:
    """Sums of each head's attention from some places to others, [H].

    Args:
        query: [S, B, H, D].
        key: [S, B, G, D].
        params: position and document of the layer's tokens.
        at: position of each attending token [B, A].
        to: position of the token that it should attend to [B, A].
        scale: of the scores; None: 1 / sqrt(D).
    """
    heads, width = query.shape[2:]
    total = torch.zeros(heads, device=query.device)
    for row in range(query.shape[1]):
        own = params.document_ids[:, row] == 0  # the row's only document; the rest is padding
        place = torch.full((int(params.position_ids.max()) + 1,), -1, device=query.device, dtype=torch.long)
        place[params.position_ids[own, row]] = torch.arange(int(own.sum()), device=query.device)
        attending, wanted = place[at[row].to(query.device)], place[to[row].to(query.device)]
        both = (attending >= 0) & (wanted >= 0)
        attending, wanted = attending[both], wanted[both]
        q, k = query[own, row][attending].float(), key[own, row].float()
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
        scores = torch.einsum("ahd,shd->ahs", q, k) * (width**-0.5 if scale is None else scale)
        later = torch.arange(len(k), device=query.device) > attending[:, None]
        weights = scores.masked_fill(later[:, None], -torch.inf).softmax(dim=-1)
        total += weights.gather(2, wanted[:, None, None].expand(-1, heads, 1)).sum(dim=(0, 2))
    return total


def best_heads(scores: NDArray[np.float64], *, share: float) -> list[tuple[int, int]]:
    """The heads with the highest scores, at least one: layer and head, counted from 0, in that order.

    Args:
        scores: [L, H].
        share: of all heads.
    """
    count = max(1, round(share * scores.size))
    chosen = np.argsort(-scores.reshape(-1), kind="stable")[:count]
    return sorted((int(one) // scores.shape[1], int(one) % scores.shape[1]) for one in chosen)


@contextlib.contextmanager
def masked_heads(model: RunModel, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside, these heads contribute nothing to the output of their attention layer.

    Args:
        model: a loaded checkpoint.
        heads: layer and head, counted from 0.
    """
    count = model.config.model.num_attention_heads
    with contextlib.ExitStack() as stack:
        for layer, module in enumerate(_attentions(model)):
            if own := [head for number, head in heads if number == layer]:
                hook = module.register_forward_hook(functools.partial(_silence, own, count))
                stack.callback(hook.remove)
        yield


def _silence(own: Sequence[int], count: int, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Zero the output of some of `count` heads, [S, B, H * D]."""
    by_head = output.unflatten(-1, (count, -1)).clone()
    by_head[..., list(own), :] = 0.0
    return by_head.flatten(-2)


def _attentions(model: RunModel) -> list[nn.Module]:
    """The attention of each layer, from the first layer on."""
    return [module for name, module in model.module.named_modules() if name.endswith(_ATTENTION)]
