"""Documents, and the pieces of documents that a context-parallel rank has, as ragged sequences for attention kernels.

Every piece is one ragged sequence: its queries are the piece, its keys the document from its first token to the piece's
last one. With a causal mask aligned to the last key ("bottom right") this is attention inside documents, and no masked
part is computed. Llama 3 (arXiv 2407.21783, section 3.3.2) gathers keys and values because of document masks, too.

Everything is computed on the device, with shapes that the host knows.

Shapes: S tokens of a sequence, N = S / CP tokens of this rank, B sequences of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.model.context import ContextSplit

_FEWEST_SEQUENCES, _ROUNDED_SEQUENCES = 32, 512  # Transformer-Engine 2.11: fused_attn.cpp, get_max_batch_size


def padded_sequences(count: int) -> int:
    """The number of ragged sequences that kernels are called with for this number of documents or pieces.

    cuDNN builds a graph for every new number of sequences. Transformer-Engine 2.11 rounds up to 32 or a power of two,
    but above 512 it uses the exact number, which differs in every micro-batch. This function rounds numbers above 512
    up, in steps of an eighth of the next power of two: four graphs from 512 to 1024.
    """
    octave = 1 << (max(count, _FEWEST_SEQUENCES) - 1).bit_length()
    step = octave if octave <= _ROUNDED_SEQUENCES else octave // 8
    return -(-count // step) * step


def begins_of(document_ids: Tensor) -> Tensor:
    """[B, S] numbers of documents -> [B, S] bool: the first tokens of documents, or of parts of them."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins


def ends_of(begins: Tensor, bound: int) -> Tensor:
    """[bound + 1] int32: 0, then the end of every ragged sequence, one after another (`cu_seqlens`).

    Args:
        begins: [B, S] bool, their first tokens.
        bound: the number of entries after the 0; empty sequences follow the last one.
    """
    first, total = begins.reshape(-1), begins.numel()
    starts = torch.where(first, torch.arange(total, device=first.device), total)
    return starts.new_full((bound + 1,), total).scatter_(0, _slots(first, bound), starts).int()


@dataclass(frozen=True)
class Pieces:
    """A rank's queries as ragged sequences, and where their keys are.

    Attributes:
        query_ends: [bound + 1] int32: 0, then the end of every piece among the rank's [B * N] queries, those of one
            sequence after another.
        key_ends: [bound + 1] int32, the same among `keys`.
        keys: [K] int64 with K = B * (S + N / 2), rows of a tensor [S * B, ...] of all tokens. Rows behind the last
            piece's repeat row 0.
        unused: [K] bool, rows behind the last piece's.
    """

    query_ends: Tensor
    key_ends: Tensor
    keys: Tensor
    unused: Tensor


def pieces_of(document_ids: Tensor, split: ContextSplit, *, bound: int) -> Pieces:
    """The pieces of this rank.

    Args:
        document_ids: [S, B]; neighbouring documents have different numbers.
        split: which tokens this rank has: two pieces of each document, or of each sequence.
        bound: number of ragged sequences, at least twice that of documents.
    """
    length, batch = document_ids.shape
    documents, own = document_ids.t(), split.own.t()  # [B, S], [B, N]
    places = torch.arange(length, device=own.device)
    starts = torch.where(begins_of(documents), places, 0).cummax(dim=1).values  # of each token's document
    begins = begins_of(documents.gather(1, own))
    begins[:, 1:] |= own[:, 1:] != own[:, :-1] + 1

    first, start, place = (tensor.reshape(-1) for tensor in (begins, starts.gather(1, own), own))  # [B * N]
    slots, last = _slots(first, bound), torch.cat((first[1:], first.new_ones(1)))
    sequence = torch.arange(first.numel(), device=own.device) // own.shape[1]
    empty = place.new_zeros(bound + 1)
    size = empty.scatter(0, torch.where(last, first.cumsum(0) - 1, bound), torch.where(last, place + 1 - start, 0))
    key_ends = torch.cat((empty[:1], size[:bound].cumsum(0)))

    row = torch.arange(batch * (length + own.shape[1] // 2), device=own.device)
    piece = torch.searchsorted(key_ends[1:], row, right=True).clamp(max=bound - 1)
    position = empty.scatter(0, slots, start)[piece] + row - key_ends[piece]
    unused = row >= key_ends[-1]
    keys = torch.where(unused, 0, position * batch + empty.scatter(0, slots, sequence)[piece])
    return Pieces(ends_of(begins, bound), key_ends.int(), keys, unused)


def _slots(first: Tensor, bound: int) -> Tensor:
    """Where each token writes what belongs to the sequence that it begins; all others write to the last place."""
    return torch.where(first, first.cumsum(0) - 1, bound)
