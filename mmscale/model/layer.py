"""Transformer layers of mixed-modal models: the plain layer and the Mixture-of-Depths layer.

Both are megatron-core's TransformerLayer; forward is overridden only to pass the per-token data of the micro-batch to
attention and to the feed-forward slot. Mixture-of-Depths: arXiv 2404.02258, MoMa (arXiv 2407.21770) section 2.3:
selected tokens go through attention and feed-forward, the others skip the layer.

Shapes: S tokens of a full sequence, split over CP context-parallel and then TP tensor-parallel ranks, B sequences, H
hidden width, K selected tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from mmscale.model.auxiliary import AuxiliaryRouter
from mmscale.model.capacity import Slots
from mmscale.model.decisions import DECISIONS
from mmscale.model.exchange import largest_everywhere
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.routing import depth_choice, depth_decided
from mmscale.model.thresholds import Thresholds
from mmscale.model.untied import untied_modules
from mmscale.tables.routings import Needs, Routing


class MixedModalLayer(TransformerLayer):
    """Attention within documents, then the feed-forward slot, which receives the per-token data as `padding_mask`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.untied = tuple(untied_modules(self))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: MixedModalParams,
        rotary_pos_emb: Tensor,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[S / CP / TP, B, H] -> ([S / CP / TP, B, H], no context)."""
        for module in self.untied:
            module.see(packed_seq_params, self.tp_group.rank())
        hidden, context = self._forward_attention(
            hidden_states,
            attention_mask=None,
            rotary_pos_emb=packed_seq_params.rotary(rotary_pos_emb),
            packed_seq_params=packed_seq_params,
        )
        output = self._forward_mlp(hidden, None, padding_mask=packed_seq_params)
        self._report_output(packed_seq_params, output)
        return output, context

    def _report_output(self, params: MixedModalParams, output: Tensor) -> None:
        """Report the mean norm of the last layer's output. Source: Chameleon, arXiv 2405.09818, section 2.3.

        The norm predicts divergence.
        """
        if params.stats is not None and self.layer_number == self.config.num_layers:
            norm = output.float().norm(dim=-1).mean()
            params.stats.add(self.layer_number, "output_norm", norm, micro_batch=params.noise_key)
        if params.stats is not None and params.stats.modalities:
            local = output.shape[0]
            own = params.local(params.modality_ids)[self.tp_group.rank() * local :][:local]
            masks = torch.stack([own == modality for modality in range(params.stats.modalities)]).double()
            sums = (masks * output.detach().float().norm(dim=-1)).sum(dim=(1, 2))
            counted = torch.stack((sums, masks.sum(dim=(1, 2))))
            params.stats.count(self.layer_number, "output_norm", counted, micro_batch=params.noise_key)


@dataclass(frozen=True)
class DepthSettings:
    """Which tokens a Mixture-of-Depths layer processes.

    Attributes:
        keep: K, tokens per sequence.
        quotas: tokens of each modality that are taken first; None: the best of any modality.
        modalities: names, for reports.
        auxiliary_width: inner width of the auxiliary router; None: there is none.
        thresholds: whether the averaged cut-off of Expert Threshold is kept.
        row_multiple: when tokens are decided one by one, every rank pads the selected ones to a multiple of this, for
            FP8.
    """

    keep: int
    quotas: tuple[int, ...] | None
    modalities: tuple[str, ...]
    auxiliary_width: int | None = None
    thresholds: bool = False
    row_multiple: int = 1


class DepthLayer(MixedModalLayer):
    """x + sigmoid(x . w) (layer(x) - x) for the K tokens with the highest scores of each sequence; x for the others.

    In causal modes the layer's auxiliary router (one for all modalities) decides for each token, so the number of
    processed tokens varies. The gate stays the main router's.
    """

    def __init__(self, *args: Any, depth: DepthSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depth = depth
        self.depth_router = nn.Parameter(torch.empty(self.config.hidden_size, dtype=self.config.params_dtype))
        # Each rank computes the scores of its own tokens, so the gradient is partial over tensor-parallel ranks.
        self.depth_router.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        if depth.auxiliary_width is not None:
            self.depth_auxiliary = AuxiliaryRouter(self.config, outputs=1, width=depth.auxiliary_width)
        if depth.thresholds:
            self.depth_threshold = Thresholds({"logit": 1})

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: MixedModalParams,
        rotary_pos_emb: Tensor,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[S / CP / TP, B, H] -> ([S / CP / TP, B, H], no context)."""
        params = packed_seq_params
        local = hidden_states.float() @ self.depth_router.float()
        # Every tensor-parallel rank computes the following in full, so backward splits the gradient instead of summing.
        logits = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=False, group=self.tp_group)
        full = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
        )
        context = self.pg_collection.cp
        logits, full = params.gather(logits, context), params.gather(full, context)
        length, batch, width = full.shape

        valid: Tensor | None = None
        if params.routing is Routing.BATCH:
            index = depth_choice(logits, params.modality_ids, self.depth.keep, self.depth.quotas)
            if params.choices is not None:
                index = params.choices.depth(
                    index, length, micro_batch=params.noise_key, place=(self.layer_number, "depth")
                )
            self._train_auxiliary(hidden_states, logits.detach(), index, params)
        else:
            index, valid = self._decide(hidden_states, logits, params)
        inner = params.select(index, valid, quotas=self.depth.quotas)
        # The part of the selected tokens that this context-parallel rank computes.
        mine, real = inner.local(index), None if valid is None else inner.local(valid)
        rows = (mine * batch + torch.arange(batch, device=index.device)).reshape(-1)
        selected = full.reshape(length * batch, width).index_select(0, rows).view(-1, batch, width)
        if params.stats is not None:
            self._report(params, inner)

        out, nothing = super().forward(
            scatter_to_sequence_parallel_region(selected, group=self.tp_group),
            packed_seq_params=inner,
            rotary_pos_emb=rotary_pos_emb,
        )
        out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp_group)

        weight = torch.sigmoid(logits.reshape(-1).index_select(0, rows)).unsqueeze(-1)
        if real is not None:
            weight = weight * real.reshape(-1, 1)
        delta = (weight * (out - selected).reshape(-1, width).float()).to(full.dtype)
        update = torch.zeros_like(full).reshape(length * batch, width).index_add_(0, rows, delta)
        update = params.scatter_sum(update.view(length, batch, width), context)
        update = scatter_to_sequence_parallel_region(update, group=self.tp_group)
        output = hidden_states + update
        self._report_output(params, output)
        return output, nothing

    def _decide(self, hidden: Tensor, logits: Tensor, params: MixedModalParams) -> tuple[Tensor, Tensor]:
        """Positions [K, B] of the tokens to process, decided from each token alone, and a mask of the valid ones."""
        if params.routing.mode.needs is Needs.THRESHOLDS:
            scores, threshold = logits, self.depth_threshold.of("logit")
        else:
            scores = gather_from_sequence_parallel_region(
                self.depth_auxiliary(hidden), tensor_parallel_output_grad=False, group=self.tp_group
            ).squeeze(-1)
            scores = params.gather(scores, self.pg_collection.cp)
            threshold = self.depth_auxiliary.threshold
        taken = DECISIONS[params.routing].depth(scores, threshold) & (params.modality_ids >= 0)
        multiple = self.tp_group.size() * self.depth.row_multiple
        if params.context is not None:  # the zig-zag split cuts sequences into 2 * CP equal pieces
            multiple *= 2 * params.context.size
        # The experts inside the layer need the same number of tokens on all ranks that exchange tokens.
        (most,) = largest_everywhere(taken.sum(dim=0).max().view(1), self.pg_collection.ep)
        return depth_decided(taken, -(-max(1, most) // multiple) * multiple)

    @torch.no_grad()
    def _train_auxiliary(self, hidden: Tensor, logits: Tensor, index: Tensor, params: MixedModalParams) -> None:
        """Pass the true choice to the auxiliary router, and the cut-off of the choice to the moving average."""
        if params.learning is not None:
            taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(0, index, True)
            own = slice(self.tp_group.rank() * hidden.shape[0], (self.tp_group.rank() + 1) * hidden.shape[0])
            masks = {
                name: params.local(params.tokens_of((number,)))[own]
                for number, name in enumerate(self.depth.modalities)
            }
            params.learning.observe(
                self.depth_auxiliary,
                hidden,
                params.local(taken)[own].unsqueeze(-1),
                masks,
                layer=self.layer_number,
                kind="depth",
                micro_batch=params.noise_key,
            )
        if params.cutoffs is not None and self.depth.thresholds:
            params.cutoffs.add(
                self.depth_threshold.of("logit"),
                logits.unsqueeze(-1),
                params.modality_ids >= 0,
                Slots(self.depth.keep),
                per_sequence=True,
                key=(self.layer_number, "depth", params.noise_key),
            )

    def _report(self, params: MixedModalParams, inner: MixedModalParams) -> None:
        assert params.stats is not None
        for modality, name in enumerate(self.depth.modalities):
            total = params.tokens_of((modality,)).sum()
            share = inner.tokens_of((modality,)).sum() / total.clamp(min=1)
            figure = f"depth/selected_fraction/{name}"
            params.stats.add(self.layer_number, figure, share, weight=total, micro_batch=params.noise_key)
        if params.stats.modalities:
            counted = [
                torch.stack([facts.tokens_of((m,)).sum() for m in range(params.stats.modalities)])
                for facts in (inner, params)
            ]
            params.stats.count(self.layer_number, "depth", torch.stack(counted), micro_batch=params.noise_key)
