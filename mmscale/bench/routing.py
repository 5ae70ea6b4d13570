"""Measures the share of tokens without an expert under each capacity rule and ranking, with random routers.

Experts choose by independent normal logits among the tokens of packed documents of the synthetic corpus of `mmscale
bench data`, with the model's own code. It trains nothing: trained experts do not choose at random.

    mmscale bench routing
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmscale.bench.corpus import synthetic_corpus
from mmscale.config.derived import expert_capacity
from mmscale.data.stream.packing import deal, pack_epoch
from mmscale.errors import UsageError
from mmscale.model.capacity import Slots, TokenCounts, actual_slots
from mmscale.model.ranking import RANKINGS
from mmscale.model.routing import chosen_by, expert_choice

_NAMES = ("text", "image")
_SCOPES = ("sequence", "micro_batch")
_CAPACITIES = ("nominal", "actual")
_WINDOW = 2048  # sequences that are dealt together, as data.deal_window


def run(
    *,
    documents: int = 40_000,
    seq_length: int = 4096,
    micro_batch: int = 4,
    micro_batches: int = 48,
    experts: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Let experts choose among random logits under every rule.

    Args:
        documents: of the corpus.
        seq_length: tokens of a sequence.
        micro_batch: sequences of a micro-batch.
        micro_batches: number of micro-batches to measure.
        experts: experts of each of the two groups.
        seed: of the corpus, its order and the logits.

    Returns:
        `share` (of each modality in the tokens, which determines nominal capacities), `seconds`, and `rows`: one for
        each `capacity`, `scope` and `choice` with `unrouted` (of all tokens), `unrouted/<modality>`, `unrouted_single`
        (of the tokens of sequences with one modality only, or None), `slots_per_token` and `filled` (of the slots).

    Raises:
        UsageError: there are too few documents.
    """
    began = time.perf_counter()
    corpus = synthetic_corpus(documents=documents, seq_length=seq_length, seed=seed)
    lengths = corpus.counts.sum(axis=1)
    packing = pack_epoch(lengths, seq_length=seq_length, window=8192, seed=seed, source=0, epoch=0)
    counts = packing.sums(corpus.counts)
    share = counts.sum(axis=0) / counts.sum()
    wanted = micro_batch * micro_batches
    usable = min(len(counts), max(_WINDOW, wanted)) // micro_batch * micro_batch
    if usable < wanted:
        raise UsageError(
            f"bench routing: {documents} documents fill {len(counts)} sequences, {wanted} are needed",
            remedy="give more --documents, or fewer --micro-batches",
        )
    dealt = counts[:usable][deal(counts[:usable], group=micro_batch)][:micro_batches]  # [micro_batches, B, M]
    rows = []
    for capacity, scope, choice in product(_CAPACITIES, _SCOPES, RANKINGS):
        generator = torch.Generator().manual_seed(seed)
        found = sum(
            _measured(
                one,
                torch.randn(len(_NAMES), seq_length, micro_batch, experts, generator=generator),
                share,
                actual=capacity == "actual",
                per_sequence=scope == "sequence",
                choice=choice,
            )
            for one in dealt
        )
        rows.append({"capacity": capacity, "scope": scope, "choice": choice, **_figures(np.asarray(found))})
    return {
        "share": dict(zip(_NAMES, share.tolist(), strict=True)),
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }


def _measured(
    counts: NDArray[np.int64],
    logits: Tensor,
    share: NDArray[np.float64],
    *,
    actual: bool,
    per_sequence: bool,
    choice: str,
) -> NDArray[np.int64]:
    """Sums of one micro-batch [M, 6].

    For each modality: tokens, unrouted ones, both in sequences without any other modality, slots, filled slots.
    """
    experts, length, batch = logits.shape[-1], logits.shape[1], len(counts)
    known = TokenCounts(counts, counts[None])
    found = []
    for modality, (mask, single) in enumerate(_tokens(counts, length)):
        if actual:
            slots = actual_slots(known, mask, (modality,), experts, per_sequence=per_sequence, factor=1.0, multiple=1)
        else:
            scope = length if per_sequence else length * batch
            slots = Slots(expert_capacity(scope, float(share[modality]), experts, factor=1.0, multiple=1, limit=scope))
        selection = expert_choice(logits[modality], mask, slots, per_sequence=per_sequence, rank=RANKINGS[choice])
        left = mask & ~chosen_by(selection, mask.numel()).any(dim=1).view(mask.shape)
        sums = (mask, left, single, left & single, torch.ones_like(selection.valid), selection.valid)
        found.append([int(values.sum()) for values in sums])
    return np.array(found)


def _tokens(counts: NDArray[np.int64], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each modality which tokens [S, B] belong to it, and which are in a sequence without any other modality."""
    place = torch.arange(length).unsqueeze(1)
    ends = torch.from_numpy(counts.cumsum(axis=1))
    for modality in range(counts.shape[1]):
        begin = ends[:, modality] - torch.from_numpy(counts[:, modality])
        own = (place >= begin) & (place < ends[:, modality])
        yield own, own & torch.from_numpy(counts[:, modality] == counts.sum(axis=1))


def _figures(sums: NDArray[np.int64]) -> dict[str, float | None]:
    tokens, left, single, single_left, slots, filled = sums.sum(axis=0).tolist()
    by_modality = {f"unrouted/{name}": row[1] / max(1, row[0]) for name, row in zip(_NAMES, sums.tolist(), strict=True)}
    return {
        "unrouted": left / tokens,
        **by_modality,
        "unrouted_single": single_left / single if single else None,
        "slots_per_token": slots / tokens,
        "filled": filled / slots,
    }


def render(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    heads = ["capacity", "scope", "choice", "no expert", "text", "image", "in sequences of one modality"]
    heads += ["slots per token", "filled"]
    lines = [heads, ["---"] * len(heads)]
    for row in result["rows"]:
        shares = (row[key] for key in ("unrouted", "unrouted/text", "unrouted/image", "unrouted_single"))
        cells = ("-" if share is None else f"{share:.1%}" for share in shares)
        slots = (f"{row['slots_per_token']:.2f}", f"{row['filled']:.0%}")
        lines.append([row["capacity"], row["scope"], row["choice"], *cells, *slots])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
