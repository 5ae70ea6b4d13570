"""Modality-grouped feed-forward experts with expert choice (MoMa, arXiv 2407.21770, section 2.2).

Fills the `mlp` slot of megatron-core's TransformerLayer. One group with all modalities is the paper's mixed `moe`.
token_choice.py has the other rule, by which tokens choose experts.

With context parallelism every rank gathers logits and hidden states of the whole sequence, makes the same choice, and
computes an equal part of every expert's slots; the outputs are summed over the ranks (docs/context_parallel.md).

Shapes: S tokens of a full sequence, B sequences, H hidden width, E experts of a group, C tokens per expert.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.config.derived import expert_capacity, experts_of_ranks
from mmscale.model.auxiliary import AuxiliaryRouter
from mmscale.model.capacity import Slots, actual_slots
from mmscale.model.decisions import DECISIONS
from mmscale.model.exchange import largest_everywhere, receive_as_expert, send_back, send_to_experts
from mmscale.model.expert_compute import ExpertCompute, Products
from mmscale.model.experts import Experts, from_experts, to_experts
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma_settings import ExpertGroup, MoMaSettings
from mmscale.model.norm import RMSNorm
from mmscale.model.ranking import RANKINGS, Ranking
from mmscale.model.routing import (
    Selection,
    add_weighted,
    chosen_by,
    dealt,
    decided,
    expert_choice,
    gumbel_noise,
    noise_key,
    rows_of,
)
from mmscale.model.routing_figures import report_choice
from mmscale.model.thresholds import Thresholds
from mmscale.model.token_choice import TokenChoice
from mmscale.model.ungated import every_token, ungated_experts
from mmscale.tables.routings import Needs, Routing


class Router(nn.Module):
    """Logits of all groups' experts, x . w_e, in fp32.

    The router is a separate module that is called, because overlapped parameter gathering waits for a weight in a
    forward hook of the module that holds it (distributed_data_parallel.py), and the hooks of a mere container never
    run.
    """

    def __init__(self, config: TransformerConfig, groups: tuple[ExpertGroup, ...]) -> None:
        super().__init__()
        for group in groups:
            weight = nn.Parameter(torch.empty(group.experts, config.hidden_size, dtype=config.params_dtype))
            # The router sees this rank's tokens only, so its gradient is a partial sum over tensor-parallel ranks.
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(group.name, weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., experts of all groups], fp32."""
        return F.linear(hidden.float(), torch.cat(tuple(self.parameters())).float())


class MoMaMLP(MegatronModule):
    """y = sum over the experts e that took the token of sigmoid(x . w_e) FFN_e(x), plus the shared experts' output."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        settings: MoMaSettings,
        groups: ProcessGroupCollection,
        **_: object,  # from 0.18 on megatron-core also passes its own pg_collection and names
    ) -> None:
        super().__init__(config=config)
        self.settings = settings
        self.pg = groups
        self._rank = RANKINGS[settings.choice]
        self.layer_number = 0
        assert config.sequence_parallel or self.pg.tp.size() == 1, (
            "router gradients are partial over tensor-parallel ranks; only sequence parallelism has them summed"
        )
        width = config.ffn_hidden_size
        assert width is not None
        make = _maker(settings.compute)
        self.experts = nn.ModuleDict()
        self.router = Router(config, settings.groups)
        self.expert_norm = nn.ModuleDict()
        self.ungated = ungated_experts(config, settings, self.pg, make=make)
        counts = {group.name: group.experts for group in settings.groups}
        self.places = list(experts_of_ranks(counts, self.pg.ep.size()).values())
        for group, places in zip(settings.groups, self.places, strict=True):
            if own := places[self.pg.ep.rank()]:
                self.experts[group.name] = make(
                    config, count=group.experts, width=width, groups=self.pg, own=own, compute=settings.compute
                )
        if settings.norm_experts:
            self.expert_norm.update({group.name: self._norm() for group in settings.groups + settings.ungated})
        self.shared: MegatronModule | None = None
        self.shared_norm: RMSNorm | None = None
        if settings.shared_width:
            self.shared = make(
                config,
                count=1,
                width=settings.shared_width,
                groups=self.pg,
                own=None,
                compute=settings.compute,
            )
            self.shared_norm = self._norm() if settings.norm_experts else None

        self.auxiliary = nn.ModuleDict()
        if settings.auxiliary_width is not None:
            width = settings.auxiliary_width
            for group in settings.groups:
                self.auxiliary[group.name] = AuxiliaryRouter(config, outputs=group.experts, width=width)
        self.router_bias = TokenChoice(settings, self.pg.ep) if settings.token_choice is not None else None
        self.threshold = Thresholds(counts, rank=self._rank) if settings.thresholds else None

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config, self.config.hidden_size, self.config.layernorm_epsilon, replicated=True)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by megatron-core's layer with its global number, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden_states: Tensor, padding_mask: MixedModalParams | None = None) -> tuple[Tensor, None]:
        """[S / CP / TP, B, H] -> ([S / CP / TP, B, H], no bias).

        Args:
            hidden_states: this rank's tokens.
            padding_mask: the micro-batch's `MixedModalParams`. `padding_mask` is the one unused argument of the mlp
                slot; recompute binds it with functools.partial.
        """
        params = padding_mask
        assert params is not None, "MoMa layers need the micro-batch's modality ids"
        logits = self._router_logits(hidden_states, params)
        local = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=self.pg.tp)
        full = params.gather(local, self.pg.cp)
        length, batch, width = full.shape
        flat, own = full.reshape(length * batch, width), local.reshape(-1, width)

        if self.router_bias is not None:  # the same in every routing mode
            selections = self.router_bias.select(self._by_group(logits), params, layer=self.layer_number)
        elif params.routing is Routing.BATCH:
            selections = self._select(logits, params)
            if params.learning is not None:
                self._train_auxiliary(hidden_states, logits, selections, params)
        else:
            selections = self._decide(hidden_states, logits, params)
        selections = [self._dealt(selection) for selection in selections]
        chosen = [rows_of(flat, s, empty_as_zero=self.router_bias is not None) for s in selections]
        shared: Tensor | None = None
        if self.settings.overlap:
            outputs, shared = self._overlapped(chosen, own)
        else:
            received = to_experts(chosen, self.places, self.pg.ep)
            computed = [self._computed(g, tokens) for g, tokens in zip(self.settings.groups, received, strict=True)]
            outputs = from_experts(computed, self.places, self.pg.ep)

        everything = [self._dealt(every_token(group, params, self.settings)) for group in self.settings.ungated]
        for group, selection in zip(self.settings.ungated, everything, strict=True):
            outputs.append(self.ungated[group.name](rows_of(flat, selection, empty_as_zero=True)))
        every_group = self.settings.groups + self.settings.ungated
        total = flat.new_zeros(flat.shape, dtype=torch.float32)
        for group, output, selection in zip(every_group, outputs, selections + everything, strict=True):
            if self.settings.norm_experts:
                output = self.expert_norm[group.name](
                    reduce_from_tensor_model_parallel_region(output, group=self.pg.tp)
                )
            add_weighted(total, output, selection)
        total = self._summed(total.view(length, batch, width), params, dtype=hidden_states.dtype).flatten(0, 1)
        if self.shared is not None:
            output = (self.shared(own.unsqueeze(0)) if shared is None else shared).squeeze(0)
            if self.shared_norm is not None:
                output = self.shared_norm(reduce_from_tensor_model_parallel_region(output, group=self.pg.tp))
            total.add_(output)

        whole = total.to(hidden_states.dtype).view(local.shape)
        if self.settings.norm_experts:  # already summed over tensor-parallel ranks
            return scatter_to_sequence_parallel_region(whole, group=self.pg.tp), None
        return reduce_scatter_to_sequence_parallel_region(whole, group=self.pg.tp), None

    def _dealt(self, selection: Selection) -> Selection:
        """The slots that this context-parallel rank computes; all ranks have the same number."""
        return dealt(
            selection, rank=self.pg.cp.rank(), size=self.pg.cp.size(), multiple=self.settings.capacity_multiple
        )

    def _summed(self, total: Tensor, params: MixedModalParams, *, dtype: torch.dtype) -> Tensor:
        """Outputs [S, B, H] of this rank's slots -> those of all slots for this rank's tokens, fp32 [S / CP, B, H].

        The message has the hidden states' dtype, as for partial sums over tensor-parallel ranks.
        """
        return total if params.context is None else params.scatter_sum(total.to(dtype), self.pg.cp).float()

    def _overlapped(self, chosen: list[Tensor], own: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Outputs of all groups and of the shared experts, computed while other groups' tokens are exchanged."""
        ep, groups = self.pg.ep, self.settings.groups
        there = [send_to_experts(tokens, places, ep) for tokens, places in zip(chosen, self.places, strict=True)]
        shared = None if self.shared is None else self.shared(own.unsqueeze(0))
        back = []
        for group, places, tokens, pending in zip(groups, self.places, chosen, there, strict=True):
            output = self._computed(group, receive_as_expert(pending, places, ep))
            back.append(send_back(output, places, tokens.shape[1], ep))
        returned = [pending.arrived() for pending in back]
        return [rows.view(*tokens.shape) for rows, tokens in zip(returned, chosen, strict=True)], shared

    def _computed(self, group: ExpertGroup, tokens: Tensor) -> Tensor:
        """Outputs of this rank's experts of a group; empty if it has none."""
        output: Tensor = self.experts[group.name](tokens) if group.name in self.experts else tokens
        return output

    def _router_logits(self, hidden: Tensor, params: MixedModalParams) -> Tensor:
        """[S, B, all experts] fp32; each rank computes the logits of its own tokens, then they are gathered."""
        local = self.router(hidden)
        # Gates multiply expert outputs that are partial sums over tensor-parallel ranks, so the gradients of gates are
        # partial too, and backward sums them. Normalised experts have complete outputs; there backward only splits.
        partial = not self.settings.norm_experts
        logits = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=partial, group=self.pg.tp)
        logits = params.gather(logits, self.pg.cp)
        if self._noisy:
            logits = logits + self._noise(logits, params)
        return logits

    @property
    def _noisy(self) -> bool:
        return self.settings.gumbel and self.training

    def _noise(self, logits: Tensor, params: MixedModalParams) -> Tensor:
        key = noise_key(seed=self.settings.noise_seed, micro_batch=params.noise_key, layer=self.layer_number)
        return gumbel_noise(logits.shape, key=key, device=logits.device)

    def _by_group(self, logits: Tensor) -> list[tuple[ExpertGroup, Tensor]]:
        groups = self.settings.groups
        return list(zip(groups, logits.split([group.experts for group in groups], dim=-1), strict=True))

    def _select(self, logits: Tensor, params: MixedModalParams, *, report: bool = True) -> list[Selection]:
        """Expert choice among all tokens of the sequence or of the micro-batch."""
        selections = []
        for group, own in self._by_group(logits):
            member = params.tokens_of(group.modalities)
            slots = self._slots(group, params, member)
            selection = self._choose(group.name, own, member, slots, params, noisy=report)
            if report and params.stats is not None:
                report_choice(params, self.layer_number, group, selection)
            if report and params.cutoffs is not None and self.threshold is not None:
                params.cutoffs.add(
                    self.threshold.of(group.name),
                    self._rank(own.detach()),
                    member,
                    slots,
                    per_sequence=self.settings.per_sequence,
                    key=(self.layer_number, group.name, params.noise_key),
                )
            selections.append(selection)
        return selections

    def _choose(
        self, name: str, logits: Tensor, member: Tensor, slots: Slots, params: MixedModalParams, *, noisy: bool
    ) -> Selection:
        def choose(rank: Ranking) -> Selection:
            return expert_choice(logits, member, slots, per_sequence=self.settings.per_sequence, rank=rank)

        if params.choices is None:
            return choose(self._rank)
        place = (self.layer_number, name, noisy)
        return params.choices.experts(choose, self._rank, shape=logits.shape, micro_batch=params.noise_key, place=place)

    def _slots(self, group: ExpertGroup, params: MixedModalParams, member: Tensor) -> Slots:
        """The slots of a group's experts; the same for all layers of a micro-batch that process the same tokens."""
        length, batch = member.shape
        factor, multiple = self.settings.capacity_factor, self.settings.capacity_multiple
        if not self.settings.actual:
            scope = length if self.settings.per_sequence else length * batch
            return Slots(
                expert_capacity(scope, group.share, group.experts, factor=factor, multiple=multiple, limit=scope)
            )
        counts = params.counts
        assert counts is not None and counts.everyone.shape[0] == self.pg.ep.size(), (
            "actual capacity needs the token counts of all expert-parallel ranks' micro-batches (MicroBatch.everyone)"
        )
        return params.cached(
            ("slots", group.name),
            lambda: actual_slots(
                counts,
                member,
                group.modalities,
                group.experts,
                per_sequence=self.settings.per_sequence,
                factor=factor,
                multiple=multiple,
            ),
        )

    def _scores(
        self, group: ExpertGroup, logits: Tensor, hidden: Tensor, params: MixedModalParams
    ) -> tuple[Tensor, Tensor]:
        """The values [S, B, E] that a causal mode decides by, and the thresholds [E] that they are compared with."""
        if params.routing.mode.needs is Needs.THRESHOLDS:
            assert self.threshold is not None, "the caller checks that the model keeps thresholds"
            return self._rank(logits), self.threshold.of(group.name)
        router = self.auxiliary[group.name]
        assert isinstance(router, AuxiliaryRouter)
        scores = gather_from_sequence_parallel_region(
            router(hidden), tensor_parallel_output_grad=False, group=self.pg.tp
        )
        return params.gather(scores, self.pg.cp), router.threshold

    def _decide(self, hidden: Tensor, logits: Tensor, params: MixedModalParams) -> list[Selection]:
        """Each token's experts, decided from the token alone, in any mode except BATCH."""
        taken = []
        for group, own in self._by_group(logits):
            member = params.tokens_of(group.modalities).unsqueeze(-1)
            taken.append(DECISIONS[params.routing].experts(*self._scores(group, own, hidden, params)) & member)
        # Every expert gets as many slots as the fullest expert of any rank needs, so no token is dropped.
        most = largest_everywhere(torch.stack([group.sum(dim=(0, 1)).max() for group in taken]), self.pg.ep)
        selections = []
        for (group, own), decision, count in zip(self._by_group(logits), taken, most, strict=True):
            multiple = self.settings.capacity_multiple  # FP8 needs rows in this multiple here too
            selection = decided(decision, torch.sigmoid(own), -(-max(1, count) // multiple) * multiple)
            if params.stats is not None:
                report_choice(params, self.layer_number, group, selection)
            selections.append(selection)
        return selections

    @torch.no_grad()
    def _train_auxiliary(
        self, hidden: Tensor, logits: Tensor, selections: list[Selection], params: MixedModalParams
    ) -> None:
        """Pass the true choice to the auxiliary routers. Each rank passes the choices for its own tokens."""
        assert params.learning is not None
        length, batch, _ = logits.shape
        if self._noisy:  # routers learn to predict the choice without noise
            selections = self._select(logits - self._noise(logits, params), params, report=False)
        mine = slice(self.pg.tp.rank() * hidden.shape[0], (self.pg.tp.rank() + 1) * hidden.shape[0])
        for group, selection in zip(self.settings.groups, selections, strict=True):
            router = self.auxiliary[group.name]
            assert isinstance(router, AuxiliaryRouter)
            taken = chosen_by(selection, length * batch).view(length, batch, group.experts)
            params.learning.observe(
                router,
                hidden,
                params.local(taken)[mine],
                {group.name: params.local(params.tokens_of(group.modalities))[mine]},
                layer=self.layer_number,
                kind=f"experts/{group.name}",
                micro_batch=params.noise_key,
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Routers and norms are replicated; the experts' module shards its own parameters."""
        sharded: ShardedStateDict = {}
        for kind, modules in (("experts", self.experts), ("ungated", self.ungated)):
            for name, experts in modules.items():
                assert isinstance(experts, MegatronModule)
                sharded.update(experts.sharded_state_dict(f"{prefix}{kind}.{name}.", sharded_offsets, metadata))
        if self.shared is not None:
            sharded.update(self.shared.sharded_state_dict(f"{prefix}shared.", sharded_offsets, metadata))
        replicated: dict[str, Tensor] = {f"router.{name}": weight for name, weight in self.router.named_parameters()}
        replicated |= {f"auxiliary.{name}": value for name, value in self.auxiliary.state_dict(keep_vars=True).items()}
        replicated |= {f"expert_norm.{name}": value for name, value in self.expert_norm.named_parameters()}
        if self.shared_norm is not None:
            replicated |= {f"shared_norm.{name}": value for name, value in self.shared_norm.named_parameters()}
        if self.router_bias is not None:
            replicated |= {f"router_bias.{name}": value for name, value in self.router_bias.named_buffers()}
        if self.threshold is not None:
            replicated |= {f"threshold.{name}": value for name, value in self.threshold.named_buffers()}
        sharded.update(
            make_sharded_tensors_for_checkpoint(
                replicated, prefix, {}, sharded_offsets, tp_group=self.pg.tp, dp_cp_group=self.pg.dp_cp
            )
        )
        return sharded


def _maker(compute: ExpertCompute) -> type[MegatronModule]:
    if compute.products is not Products.TE:
        return Experts
    # Cannot be imported without Transformer-Engine.
    from mmscale.model.experts_te import TEExperts

    return TEExperts
