"""Metrics of a choice of experts for the logs: tokens that no expert took, and how evenly experts are used."""

from __future__ import annotations

import torch

from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma_settings import ExpertGroup
from mmscale.model.routing import Selection, chosen_by, count_choices


@torch.no_grad()
def report_choice(params: MixedModalParams, layer: int, group: ExpertGroup, selection: Selection) -> None:
    """Report the share of the group's tokens that no expert took, and how unevenly experts are used (std / mean).

    A micro-batch without tokens of the group has a weight of 0.

    With expert choice all experts take the same number of tokens, so their fill is not informative; the sums of their
    gates show whether some experts are hardly used.

    Args:
        params: the micro-batch; collects the metrics.
        layer: its number, from 1.
        group: the experts.
        selection: their choice among all tokens of the micro-batch.
    """
    stats = params.stats
    assert stats is not None
    own = params.tokens_of(group.modalities).reshape(-1)
    by_expert = chosen_by(selection, own.numel())
    # Indexing with a mask of slots would wait for the device, because the number of results is unknown.
    taken = by_expert.any(dim=1)
    micro_batch, tokens = params.noise_key, own.sum()
    missed = (~taken & own).sum() / tokens.clamp(min=1)
    stats.add(layer, f"experts/{group.name}/unrouted_fraction", missed, weight=tokens, micro_batch=micro_batch)
    for figure, values in (
        ("tokens_per_expert_cv", selection.valid.sum(dim=1).float()),
        ("gate_mass_cv", selection.gate.detach().sum(dim=1)),
    ):
        spread = values.std(correction=0) / values.mean().clamp(min=1e-9)
        stats.add(layer, f"experts/{group.name}/{figure}", spread, weight=own.any(), micro_batch=micro_batch)
    if stats.modalities:
        for modality in group.modalities:
            counted = count_choices(by_expert, selection, params.tokens_of((modality,)).reshape(-1))
            stats.count(layer, f"experts/{group.name}/{modality}", counted, micro_batch=micro_batch)
