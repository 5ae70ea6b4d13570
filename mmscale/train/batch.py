"""A micro-batch from the loader (NumPy, host) -> tensors on this rank's device and the facts that layers need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmscale.data.mixture import MicroBatch
from mmscale.data.vocab import Vocabulary
from mmscale.model.mixed_modal import MixedModalParams, Routing, RoutingStats
from mmscale.runtime import device


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    Attributes:
        tokens, labels: [B, S] int64.
        label_modality: [B, S] int8.
        loss_mask: [B, S] fp32, 1 where the label is trained on.
        params: facts for the layers, [S, B] inside.
    """

    tokens: Tensor
    labels: Tensor
    label_modality: Tensor
    loss_mask: Tensor
    params: MixedModalParams


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
        vocabulary: gives the labels' modality; losses are reported by it, routing goes by the input token's.
        stats: where layers report routing figures; None on steps that are not logged.
        routing: who decides which experts take a token.
    """
    where, ids = device.taken(), micro_batch.document_ids

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(where, non_blocking=True)

    return Batch(
        tokens=tensor(micro_batch.tokens),
        labels=tensor(micro_batch.labels),
        label_modality=tensor(vocabulary.modality_of(micro_batch.labels)),
        loss_mask=tensor(micro_batch.loss_mask),
        params=MixedModalParams.of(
            modality_ids=tensor(micro_batch.modality_ids),
            position_ids=tensor(micro_batch.position_ids),
            document_ids=tensor(micro_batch.document_ids),
            noise_key=micro_batch.index,
            stats=stats,
            routing=routing,
            documents=len(ids) + int(np.count_nonzero(ids[:, 1:] != ids[:, :-1])),
        ),
    )
