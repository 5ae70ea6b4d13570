"""Groups of one expert without a router: it takes every token of its modality, without gate and capacity.

This is the feed-forward layer of Mixture-of-Transformers (arXiv 2411.04996, section 2), beside experts of other
modalities. Its weights are dense parameters: every expert-parallel rank holds a copy and computes its own tokens.
With context parallelism its slots are divided among the ranks like those of experts.

Shapes: S tokens of a full sequence, B sequences, C slots.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma_settings import ExpertGroup, MoMaSettings
from mmscale.model.routing import Selection, decided


def ungated_experts(
    config: TransformerConfig, settings: MoMaSettings, groups: ProcessGroupCollection, *, make: type[MegatronModule]
) -> nn.ModuleDict:
    """The expert of each ungated group, by the group's name.

    Args:
        config: gives widths, dtype and initialisation.
        settings: the layer's.
        groups: process groups of this rank.
        make: class of the experts.
    """
    # Captured graphs have fixed shapes, but the tokens of a modality differ in every batch.
    compute = replace(settings.compute, graph=False)
    width = config.ffn_hidden_size
    return nn.ModuleDict(
        {
            group.name: make(config, count=1, width=width, groups=groups, own=None, compute=compute)
            for group in settings.ungated
        }
    )


def every_token(group: ExpertGroup, params: MixedModalParams, settings: MoMaSettings) -> Selection:
    """All tokens of a group, [1, C], each with gate 1. Made once for all layers that process the same tokens.

    C is the host's number of these tokens, so that nothing waits for the device. In a Mixture-of-Depths layer the host
    knows an upper bound only, and the rest of the slots is empty. If the host has no counts, they are read from the
    device.
    """

    def make() -> Selection:
        member, counts = params.tokens_of(group.modalities), params.counts
        tokens = member.sum() if counts is None else counts.most(counts.own, group.modalities).sum()
        multiple = settings.capacity_multiple
        slots = -(-max(1, int(tokens)) // multiple) * multiple
        return decided(member.unsqueeze(-1), member.unsqueeze(-1).float(), slots)

    return params.cached(("every token of", group.name, settings.capacity_multiple), make)
