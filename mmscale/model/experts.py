"""SwiGLU experts as batched 3-D parameters, and the exchange that sends tokens to them in one message.

expert_compute.py computes the products; exchange.py has the overlapped exchange.

The host knows how many experts of a group every rank holds and how many slots an expert has, so every shape is known on
the host: no counts are exchanged and nothing waits for the device. If expert parallelism does not divide a group, some
ranks hold one expert less, and messages have unequal splits (mmscale.config.derived.experts_of_ranks).

Shapes: E experts of a group, L of them on this rank, N tokens of an expert, C slots of an expert on one rank, H hidden
width, F inner width of this tensor-parallel rank.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmscale.model.expert_compute import BATCHED, ExpertCompute, feed_forward
from mmscale.model.sharding import box_of
from mmscale.runtime.cuda_graphs import Captured


class SpreadExperts(MegatronModule):
    """E equal experts: distributed over expert-parallel ranks, inner width sharded over tensor-parallel ranks.

    Args:
        config: gives widths, dtype and initialisation.
        count: E, over all expert-parallel ranks.
        width: SwiGLU inner width over all tensor-parallel ranks.
        groups: process groups; expert tensor parallelism equals tensor parallelism.
        own: the experts of this expert-parallel rank, at least one; None: every rank holds all of them as ordinary
            (dense) parameters.
        compute: implementation of the products, see expert_compute.py.

    Attributes:
        own: global indices of this rank's experts.
        replica: which copy of its shard this rank holds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        count: int,
        width: int,
        groups: ProcessGroupCollection,
        own: range | None,
        compute: ExpertCompute = BATCHED,
    ) -> None:
        super().__init__(config=config)
        self.tp, self.tp_rank = groups.tp.size(), groups.tp.rank()
        self.replica: int = groups.dp_cp.rank() if own is None else groups.expt_dp.rank()
        self.count, self.expert_parallel = count, own is not None
        self.own = range(count) if own is None else own
        assert self.own and width % self.tp == 0, "checked by mmscale.config.rules"
        self.width = width
        self._make(groups, compute)

    @abstractmethod
    def _make(self, groups: ProcessGroupCollection, compute: ExpertCompute) -> None:
        """Create the parameters of this rank's experts."""


class Experts(SpreadExperts):
    """Experts as two batched parameters. experts_te.py has the version that uses Transformer-Engine."""

    def _make(self, groups: ProcessGroupCollection, compute: ExpertCompute) -> None:
        hidden, inner, dtype = self.config.hidden_size, self.width // self.tp, self.config.params_dtype
        # In w1 the gate and up projections have their own axis, so that resharding over tensor parallelism splits one
        # plain axis.
        self.w1 = nn.Parameter(torch.empty(len(self.own), hidden, 2, inner, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(len(self.own), inner, hidden, dtype=dtype))
        for parameter, axis in ((self.w1, 3), (self.w2, 1)):
            # Without this the gradient norm counts only the shard of tensor-parallel rank 0
            # (tensor_parallel/layers.py).
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            # False: the gradient is reduced over the expert-data-parallel group, in separate buffers. Also at EP = 1,
            # so that checkpoints have the same two optimizers under every layout (distributed_data_parallel.py).
            parameter.allreduce = not self.expert_parallel  # type: ignore[attr-defined]
        function = functools.partial(feed_forward, compute=compute)
        self.compute = Captured(function) if compute.graph else function

    def forward(self, tokens: Tensor) -> Tensor:
        """[L, N, H] -> [L, N, H], partial over tensor-parallel ranks: the caller sums."""
        return self.compute(tokens, self.w1, self.w2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global tensors [E, H, 2, inner] and [E, inner, H], whatever the layout."""
        del metadata
        width = self.width // self.tp
        return {
            f"{prefix}{name}": box_of(
                f"{prefix}{name}",
                getattr(self, name),
                axes={0: (self.own.start, self.count), axis: (self.tp_rank * width, self.width)},
                replica_id=(0, 0, self.replica),
                offsets=sharded_offsets,
            )
            for name, axis in (("w1", 3), ("w2", 1))
        }


Places = Sequence[range]  # of one group: the experts of every expert-parallel rank


def to_experts(
    chosen: Sequence[Tensor], places: Sequence[Places], group: torch.distributed.ProcessGroup
) -> list[Tensor]:
    """Send every group's chosen tokens to the ranks of their experts, in one all-to-all.

    All ranks always take part in forward and backward, whatever modalities their tokens have, because empty slots are
    sent too and stay in the autograd graph.

    Args:
        chosen: for each group [E, C, H], the tokens its experts took on this rank; C is the same on all ranks.
        places: for each group the experts of every rank.
        group: expert-parallel ranks.

    Returns:
        For each group [L, EP * C, H].
    """
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return list(chosen)
    width = chosen[0].shape[-1]
    sent = [
        tensor[own[other].start : own[other].stop].reshape(-1, width)
        for other in range(ranks)
        for tensor, own in zip(chosen, places, strict=True)
    ]
    there, here = splits([tensor.shape[1] for tensor in chosen], places, rank=rank)
    received = all_to_all(group, torch.cat(sent), here, there)
    rows = [len(own[rank]) * tensor.shape[1] for tensor, own in zip(chosen, places, strict=True)]
    parts = received.view(ranks, sum(rows), width).split(rows, dim=1)
    return [
        part.reshape(ranks, len(own[rank]), tensor.shape[1], width)
        .transpose(0, 1)
        .reshape(len(own[rank]), ranks * tensor.shape[1], width)
        for part, tensor, own in zip(parts, chosen, places, strict=True)
    ]


def from_experts(
    outputs: Sequence[Tensor], places: Sequence[Places], group: torch.distributed.ProcessGroup
) -> list[Tensor]:
    """The inverse of `to_experts`: for each group [L, EP * C, H] -> [E, C, H]."""
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return list(outputs)
    width = outputs[0].shape[-1]
    slots = [tensor.shape[1] // ranks for tensor in outputs]
    sent = [
        tensor.view(len(own[rank]), ranks, count, width).transpose(0, 1).reshape(ranks, len(own[rank]) * count, width)
        for tensor, own, count in zip(outputs, places, slots, strict=True)
    ]
    there, here = splits(slots, places, rank=rank)
    received = all_to_all(group, torch.cat(sent, dim=1).view(-1, width), there, here)
    # The received rows are ordered by the sending rank and, within a rank, by group. parts[number :: groups] are one
    # group's rows of all ranks; concatenated they are in the order of the group's experts.
    sizes = [len(own[other]) * count for other in range(ranks) for own, count in zip(places, slots, strict=True)]
    parts = received.split(sizes)
    return [torch.cat(parts[number :: len(places)]).view(-1, count, width) for number, count in enumerate(slots)]


def splits(slots: Sequence[int], places: Sequence[Places], *, rank: int) -> tuple[list[int], list[int]]:
    """Numbers of rows that a message with these groups sends to every rank, and that it receives from every rank.

    Args:
        slots: C of each group.
        places: of each group, the experts of every rank.
        rank: this expert-parallel rank.
    """
    there = [
        sum(len(own[other]) * count for own, count in zip(places, slots, strict=True))
        for other in range(len(places[0]))
    ]
    return there, [there[rank]] * len(there)
