"""What Muon costs (optim.optimizer = muon): state, temporary memory and FLOPs of its matrices. 0 for other optimizers.

Only the matrices of hidden layers are counted (mmscale.layers.matrices); AdamW updates all other parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import Config
from mmscale.config.derived import dense_replicas, orthogonalizes
from mmscale.layers.matrices import (
    ROUND_COPIES,
    ROUND_ELEMENTS,
    is_hidden_matrix,
    matrices_of,
    newton_schulz_flops,
)
from mmscale.plan.parameters import Parameters
from mmscale.plan.stages import stage_layers, stage_parameters

_FP32 = 4


@dataclass(frozen=True)
class MuonCost:
    """Of the fullest rank of a stage.

    Attributes:
        dense: elements of its matrices that are not distributed with experts.
        experts: those of experts.
        shard: elements of both whose momentum it keeps.
        flops: of Newton-Schulz in a step.
        narrowest: shortest side of a matrix.
    """

    dense: float = 0.0
    experts: float = 0.0
    shard: float = 0.0
    flops: float = 0.0
    narrowest: int = 1

    @property
    def temporary(self) -> float:
        """Bytes of messages, whole matrices and updates during the optimizer's step."""
        return ROUND_COPIES * _FP32 * min(self.shard, ROUND_ELEMENTS)


def matrix_parameters(config: Config, parameters: Parameters) -> int:
    """Parameters of the whole model that Muon updates; they have one moment instead of two."""
    if not orthogonalizes(config.optim):
        return 0
    return sum(tensor.size for layer in parameters.layers for tensor in layer.tensors if is_hidden_matrix(tensor))


def muon_cost(config: Config, parameters: Parameters, *, stage: int, world: int) -> MuonCost:
    """Costs on a pipeline stage. Work is assumed to be shared equally, but a matrix is never divided.

    Args:
        config: model, optimizer and layout.
        parameters: of the model, from `count_parameters`.
        stage: number of the pipeline stage.
        world: number of ranks.
    """
    if not orthogonalizes(config.optim):
        return MuonCost()
    tp, replicas = config.parallel.tp, dense_replicas(config, world)
    dense, flops, largest, narrowest = 0.0, 0.0, 0.0, 1 << 30
    for index in stage_layers(config, stage):
        for tensor in filter(is_hidden_matrix, parameters.layers[index].tensors):
            stacks = matrices_of(config, tensor)
            each = [newton_schulz_flops(s.rows, s.columns, steps=config.optim.muon.steps) for s in stacks]
            work = sum(stack.count * one for stack, one in zip(stacks, each, strict=True))
            flops += work
            largest = max(largest, work / tensor.shape[0] if tensor.spread else work)
            narrowest = min(narrowest, *(min(stack.rows, stack.columns) for stack in stacks))
            dense += 0.0 if tensor.spread else tensor.size / (tp if tensor.tp_axis is not None else 1)
    experts = stage_parameters(config, parameters, stage)[1]
    shard = dense / replicas + experts / max(1, replicas // config.parallel.ep)
    return MuonCost(dense, experts, shard, max(flops / (tp * replicas), largest), narrowest)
