"""SwiGLU experts as batched 3-D parameters, and the equal-split exchange that brings tokens to them in one message.

How they are computed is in expert_compute.py, the exchange that travels while experts compute in exchange.py.

Static capacities make every shape known on the host: no counts are exchanged and nothing waits for the device.

Shapes: E experts of a group, L = E / EP experts on this rank, N tokens of an expert, H hidden width, F inner width of
this tensor-parallel rank.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmscale.model.expert_compute import BATCHED, ExpertCompute, feed_forward
from mmscale.runtime.cuda_graphs import Captured


class SpreadExperts(MegatronModule):
    """E equal experts: whole ones spread over expert-parallel ranks, their inner width over tensor-parallel ranks.

    Args:
        config: gives widths, dtype and initialisation.
        count: E, over all expert-parallel ranks.
        width: SwiGLU inner width over all tensor-parallel ranks.
        groups: process groups; expert tensor parallelism equals tensor parallelism.
        expert_parallel: False keeps all experts on every rank as ordinary (dense) parameters.
        compute: how the products are computed, see expert_compute.py.

    Attributes:
        local_count: L.
        replica: which copy of its shard this rank holds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        count: int,
        width: int,
        groups: ProcessGroupCollection,
        expert_parallel: bool = True,
        compute: ExpertCompute = BATCHED,
    ) -> None:
        super().__init__(config=config)
        self.tp, self.tp_rank = groups.tp.size(), groups.tp.rank()
        self.ep: int = groups.ep.size() if expert_parallel else 1
        self.ep_rank: int = groups.ep.rank() if expert_parallel else 0
        self.replica: int = groups.expt_dp.rank() if expert_parallel else groups.dp_cp.rank()
        assert count % self.ep == 0 and width % self.tp == 0, "checked by mmscale.config.rules"
        self.count, self.local_count = count, count // self.ep
        self.width, self.expert_parallel = width, expert_parallel
        self._make(groups, compute)

    @abstractmethod
    def _make(self, groups: ProcessGroupCollection, compute: ExpertCompute) -> None:
        """Make the parameters of this rank's experts."""


class Experts(SpreadExperts):
    """Experts as two batched parameters; Transformer-Engine's way to compute them is experts_te.py."""

    def _make(self, groups: ProcessGroupCollection, compute: ExpertCompute) -> None:
        hidden, inner, dtype = self.config.hidden_size, self.width // self.tp, self.config.params_dtype
        # w1 keeps gate and up projections on an axis of their own: resharding over tensor parallelism is then a plain
        # axis.
        self.w1 = nn.Parameter(torch.empty(self.local_count, hidden, 2, inner, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(self.local_count, inner, hidden, dtype=dtype))
        for parameter, axis in ((self.w1, 3), (self.w2, 1)):
            # Without this the gradient norm counts tensor-parallel rank 0's shard only (tensor_parallel/layers.py).
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            # Reduced over the expert-data-parallel group, in buffers of their own; also at EP = 1, so that checkpoints
            # have the same two optimizers under every layout (distributed_data_parallel.py).
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
        prepended = len(sharded_offsets)
        sharded = {}
        for name, axis in (("w1", 3), ("w2", 1)):
            key = f"{prefix}{name}"
            sharded[key] = ShardedTensor.from_rank_offsets(
                key,
                getattr(self, name),
                *sharded_offsets,
                (prepended, self.ep_rank, self.ep),
                (prepended + axis, self.tp_rank, self.tp),
                replica_id=(0, 0, self.replica),
                prepend_axis_num=prepended,
            )
        return sharded


def to_experts(chosen: Sequence[Tensor], group: torch.distributed.ProcessGroup) -> list[Tensor]:
    """Send every group's chosen tokens to the ranks of their experts, in one all-to-all.

    All ranks always take part, whatever their modalities, in forward and backward: slots are static and stay in the
    graph.

    Args:
        chosen: for each group [E, C, H], the tokens its experts took on this rank.
        group: expert-parallel ranks; the i-th holds the i-th block of experts of every group.

    Returns:
        For each group [L, EP * C, H].
    """
    ranks = group.size()
    if ranks == 1:
        return list(chosen)
    width = chosen[0].shape[-1]
    rows = [tensor.shape[0] // ranks * tensor.shape[1] for tensor in chosen]
    sent = torch.cat([tensor.reshape(ranks, n, width) for tensor, n in zip(chosen, rows, strict=True)], dim=1)
    received = all_to_all(group, sent.reshape(-1, width)).view(ranks, sum(rows), width)
    parts = received.split(rows, dim=1)
    return [
        part.reshape(ranks, tensor.shape[0] // ranks, tensor.shape[1], width)
        .transpose(0, 1)
        .reshape(tensor.shape[0] // ranks, -1, width)
        for part, tensor in zip(parts, chosen, strict=True)
    ]


def from_experts(outputs: Sequence[Tensor], group: torch.distributed.ProcessGroup) -> list[Tensor]:
    """The inverse of `to_experts`: for each group [L, EP * C, H] -> [E, C, H]."""
    ranks = group.size()
    if ranks == 1:
        return list(outputs)
    width = outputs[0].shape[-1]
    rows = [tensor.shape[0] * tensor.shape[1] // ranks for tensor in outputs]
    sent = torch.cat(
        [
            tensor.reshape(tensor.shape[0], ranks, -1, width).transpose(0, 1).reshape(ranks, n, width)
            for tensor, n in zip(outputs, rows, strict=True)
        ],
        dim=1,
    )
    received = all_to_all(group, sent.reshape(-1, width)).view(ranks, sum(rows), width)
    parts = received.split(rows, dim=1)
    return [part.reshape(ranks * tensor.shape[0], -1, width) for part, tensor in zip(parts, outputs, strict=True)]
