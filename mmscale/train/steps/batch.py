"""Converts micro-batches of the loader (NumPy, host) to tensors on this rank's device and per-token data for layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mmscale.data.stream.conditions import conditional_labels
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.sharing import RankPart
from mmscale.data.vocab import NO_MODALITY, Vocabulary
from mmscale.errors import DataError
from mmscale.model.capacity import TokenCounts
from mmscale.model.context import ContextSplit
from mmscale.model.mixed_modal import MixedModalParams, RoutingStats
from mmscale.runtime import device
from mmscale.tables.routings import Routing


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    Attributes:
        tokens, labels: [B, S / CP] int64, those of this context-parallel rank.
        label_modality: [B, S / CP] int8.
        loss_mask: [B, S / CP] fp32, 1 where the label is trained on.
        params: per-token data for layers, of whole sequences [S, B].
        given: as in `conditional_labels`, [K - 1, B, S / CP] fp32; None: conditional losses are not measured.
    """

    tokens: Tensor
    labels: Tensor
    label_modality: Tensor
    loss_mask: Tensor
    params: MixedModalParams
    given: Tensor | None = None


def part_of(groups: ProcessGroupCollection) -> RankPart:
    """This rank's part of every global batch, and the ranks that exchange tokens with its experts."""
    # The ranks of a context-parallel group are neighbours in this list and read the same micro-batches.
    everyone, cp = torch.distributed.get_process_group_ranks(groups.dp_cp), groups.cp
    together = torch.distributed.get_process_group_ranks(groups.ep)
    places = tuple(everyone.index(rank) // cp.size() for rank in together)
    return RankPart(groups.dp.rank(), groups.dp.size(), places, (cp.rank(), cp.size()))


def to_device(
    micro_batch: MicroBatch,
    vocabulary: Vocabulary,
    *,
    stats: RoutingStats | None = None,
    routing: Routing = Routing.BATCH,
) -> Batch:
    """Copy a micro-batch to this rank's device.

    Args:
        micro_batch: from the loader.
        vocabulary: gives the modality of labels. Losses are reported by the label's modality, but routing depends on
            the input token's.
        stats: where layers report routing metrics; None on steps that are not logged.
        routing: mode by which experts are assigned to tokens.
    """
    where, ids = device.taken(), micro_batch.document_ids

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(where, non_blocking=True)

    rows = micro_batch.context

    def own(array: np.ndarray) -> Tensor:
        return tensor(array if rows is None else np.take_along_axis(array, rows.own, axis=1))

    return Batch(
        tokens=own(micro_batch.tokens),
        labels=own(micro_batch.labels),
        label_modality=own(vocabulary.modality_of(micro_batch.labels)),
        loss_mask=own(micro_batch.loss_mask),
        params=MixedModalParams.of(
            modality_ids=tensor(micro_batch.modality_ids),
            position_ids=tensor(micro_batch.position_ids),
            document_ids=tensor(micro_batch.document_ids),
            noise_key=micro_batch.index,
            stats=stats,
            routing=routing,
            documents=len(ids) + int(np.count_nonzero(ids[:, 1:] != ids[:, :-1])),
            counts=counts_of(micro_batch, modalities=len(vocabulary.names)),
            context=None if rows is None else ContextSplit(tensor(rows.order.T), rows.rank, rows.size),
        ),
    )


def with_conditions(batch: Batch, micro_batch: MicroBatch, vocabulary: Vocabulary) -> Batch:
    """The batch with marks of the labels that count for conditional losses."""
    given, rows = conditional_labels(micro_batch, vocabulary), micro_batch.context
    if rows is not None:
        given = np.take_along_axis(given, rows.own[None], axis=2)
    return replace(batch, given=torch.from_numpy(given).to(device.taken(), non_blocking=True))


def counts_of(micro_batch: MicroBatch, *, modalities: int) -> TokenCounts:
    """Tokens of each modality in every sequence, of this rank's micro-batch and those that other ranks process with it.

    Raises:
        DataError: a token belongs to no modality.
    """
    ids = micro_batch.modality_ids
    if ids.size and not NO_MODALITY <= int(ids.min()) <= int(ids.max()) < modalities:
        row, place = np.argwhere((ids < NO_MODALITY) | (ids >= modalities))[0]
        raise DataError(
            f"micro-batch {micro_batch.index}: token {place} of sequence {row} has modality {ids[row, place]}; "
            f"there are modalities 0 to {modalities - 1}, and {NO_MODALITY} for padding",
            remedy="give every token the index of one of vocab.modalities",
        )
    own = (ids[:, :, None] == np.arange(modalities)).sum(axis=1)
    everyone, rows = own[None] if micro_batch.everyone is None else micro_batch.everyone, micro_batch.context
    assert (everyone == own).all(axis=(1, 2)).any(), "this rank's micro-batch is among those of its group"
    local = None
    if rows is not None:
        computed = np.take_along_axis(ids, rows.own, axis=1)
        local = (computed[:, :, None] == np.arange(modalities)).sum(axis=(0, 1))
    return TokenCounts(own, everyone, local=local)
