"""Figures of a choice of experts for the logs: tokens that no expert took, and how evenly experts are used."""

from __future__ import annotations

import torch

from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma_settings import ExpertGroup
from mmscale.model.routing import Selection, chosen_by, count_choices


@torch.no_grad()
def report_choice(params: MixedModalParams, layer: int, group: ExpertGroup, selection: Selection) -> None:
    """Share of the group's tokens that no expert took, and how unevenly experts are filled and scored (std / mean).

    With expert choice all experts take the same number of tokens, so their fill is not informative; the sums of their
    gates show whether some experts are hardly used.

    Args:
        params: the micro-batch; it collects figures.
        layer: its number, from 1.
        group: the experts.
        selection: what they took of all tokens of the micro-batch.
    """
    stats = params.stats
    assert stats is not None
    own = params.tokens_of(group.modalities).reshape(-1)
    by_expert = chosen_by(selection, own.numel())
    taken = by_expert.any(dim=1)  # a mask of slots would be counted on the host
    # Counting the missing ones makes a micro-batch without the modality 0, not 1.
    stats.add(layer, f"experts/{group.name}/unrouted_fraction", (~taken & own).sum() / own.sum().clamp(min=1))
    for figure, values in (
        ("tokens_per_expert_cv", selection.valid.sum(dim=1).float()),
        ("gate_mass_cv", selection.gate.detach().sum(dim=1)),
    ):
        spread = values.std(correction=0) / values.mean().clamp(min=1e-9)
        stats.add(layer, f"experts/{group.name}/{figure}", spread)
    if stats.modalities:
        for modality in group.modalities:
            counted = count_choices(by_expert, selection, params.tokens_of((modality,)).reshape(-1))
            stats.count(layer, f"experts/{group.name}/{modality}", counted)
