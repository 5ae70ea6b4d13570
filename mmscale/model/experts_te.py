"""SwiGLU experts through Transformer-Engine's grouped linear: replaces experts.py's class, with the same checkpoint.

Imported only if Transformer-Engine is installed. With expert choice every expert has the same number of rows, which the
host knows, so passing the list of splits does not wait for the device.

Shapes: L experts on this rank, N rows of each, H hidden width, F inner width of this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import TEGroupedLinear, te
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from mmscale.model.expert_compute import ExpertCompute, swiglu
from mmscale.model.experts import SpreadExperts
from mmscale.model.linear_te import PlainState, with_fusion
from mmscale.model.sharding import box_of
from mmscale.model.state_te import FP8_STATE, delayed, expert_weight
from mmscale.runtime import groups as process_groups


class GroupedLinear(PlainState, TEGroupedLinear):
    """y_e = x_e W_e^T for every local expert e."""

    def __init__(self, products: int, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        self.products = products
        super().__init__(products, *args, config=with_fusion(config), **kwargs)


class TEExperts(SpreadExperts):
    """E equal experts, distributed over ranks as in experts.py."""

    def _make(self, groups: ProcessGroupCollection, compute: ExpertCompute) -> None:
        # Only for experts that are distributed over expert-parallel ranks. The scales of all others are reduced
        # together with those of dense layers.
        self.scaling_group = (
            process_groups.expert_replica_group() if self.expert_parallel and groups.ep.size() > 1 else None
        )
        self.fused, config, width = compute.fused, self.config, self.width

        def linear(inputs: int, outputs: int, mode: str, name: str) -> GroupedLinear:
            made = GroupedLinear(
                len(self.own),
                inputs,
                outputs,
                parallel_mode=mode,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                is_expert=True,
                tp_comm_buffer_name=name,
                pg_collection=groups,
            )
            for parameter in made.parameters():
                parameter.allreduce = not self.expert_parallel  # as in experts.py, also at EP = 1
            return made

        # Within a rank's shard the gate rows come before the up rows, as state_te.py expects.
        self.linear_fc1 = linear(config.hidden_size, 2 * width, "column", "fc1")
        self.linear_fc2 = linear(width, config.hidden_size, "row", "fc2")

    def forward(self, tokens: Tensor) -> Tensor:
        """[L, N, H] -> [L, N, H], partial over tensor-parallel ranks: the caller sums."""
        experts, rows, hidden = tokens.shape
        splits = [rows] * experts
        with self._scaling():
            gate_up, _ = self.linear_fc1(tokens.reshape(experts * rows, hidden), splits)
            output, _ = self.linear_fc2(swiglu(gate_up, fused=self.fused), splits)
        return output.view(experts, rows, hidden)

    def _scaling(self) -> contextlib.AbstractContextManager[None]:
        """The context in which the ranks that hold the same experts reduce their delayed scales.

        The context around all layers (fp8_utils.py) takes the maximum over all data-parallel ranks, tensor by tensor in
        the order of modules. Expert-parallel ranks hold different experts there, and different numbers of them if a
        group is not divisible: scales of different experts would mix, or messages would differ in length.
        Transformer-Engine keeps the tensors of every context separate, and reduces all of them when the outermost one
        ends.
        """
        if self.scaling_group is None or not delayed(self.config) or not FP8GlobalStateManager.is_fp8_enabled():
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = te.pytorch.fp8_autocast(
            enabled=True, fp8_recipe=FP8GlobalStateManager.get_fp8_recipe(), fp8_group=self.scaling_group
        )
        return context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The global tensors of experts.py: [E, H, 2, inner] and [E, inner, H]."""
        del metadata
        sharded: ShardedStateDict = {}
        for name, linear in (("w1", self.linear_fc1), ("w2", self.linear_fc2)):
            own = f"{prefix}{'linear_fc1' if name == 'w1' else 'linear_fc2'}."
            for index, expert in enumerate(self.own):
                sharded[f"{own}weight{index}"] = expert_weight(
                    getattr(linear, f"weight{index}"),
                    name=name,
                    key=f"{prefix}{name}",
                    expert=(expert, self.count),
                    tensor_parallel=(self.tp_rank, self.tp),
                    replica=self.replica,
                    offsets=sharded_offsets,
                )
            if delayed(self.config):
                sharded[f"{own}{FP8_STATE}"] = box_of(
                    f"{prefix}{name}.{FP8_STATE}",
                    linear.fp8_state(),
                    axes={1: (self.own.start, self.count)},
                    replica_id=(0, self.tp_rank, self.replica),
                    offsets=sharded_offsets,
                )
        return sharded
