"""Checkpoint format of Transformer-Engine's parameters and FP8 state: the torch backend's names, plain tensors.

Transformer-Engine pickles its FP8 state into bytes; here it is one plain tensor, because no checkpoint of mmscale is
unpickled. Pure functions of tensors, so that they can be tested without Transformer-Engine.

Shapes: E experts of a group, H hidden width, F inner width of this tensor-parallel rank, G products of one module (1
for a linear, the local experts for a grouped one), A length of the amax history.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

# Name, next to a module's weights, of the state of delayed scaling. A checkpoint may lack keys that end with it, and a
# run without FP8 ignores them.
FP8_STATE = "fp8_state"
# Number of scaled tensors of one product: input, weight, output; gradients of output and input.
FORWARD, BACKWARD = 3, 2


def delayed(config: TransformerConfig) -> bool:
    """Whether modules keep amax histories (delayed scaling); other recipes compute scales from the tensor itself."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def scaled_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules of Transformer-Engine whose FP8 state belongs to the run (`fp8_state`, `set_fp8_state`), by name."""
    config = getattr(model, "config", None)
    if config is None or not delayed(config):
        return
    for name, module in model.named_modules():
        if getattr(type(module), "keeps_fp8_state", False):
            yield name, module


def w1_of(weight: Tensor) -> Tensor:
    """[2 F, H] as in Transformer-Engine, gate rows before up rows -> [1, H, 2, F], a view."""
    return weight.view(2, -1, weight.shape[1]).permute(2, 0, 1).unsqueeze(0)


def weight_of_w1(w1: Tensor) -> Tensor:
    """[1, H, 2, F] -> [2 F, H], gate rows before up rows: the inverse of `w1_of`, a copy."""
    return w1.squeeze(0).permute(1, 2, 0).reshape(-1, w1.shape[1])


def w2_of(weight: Tensor) -> Tensor:
    """[H, F] -> [1, F, H], a view."""
    return weight.t().unsqueeze(0)


def weight_of_w2(w2: Tensor) -> Tensor:
    """[1, F, H] -> [H, F]: the inverse of `w2_of`, a copy."""
    return w2.squeeze(0).t().contiguous()


def expert_weight(
    parameter: Tensor,
    *,
    name: str,
    key: str,
    expert: tuple[int, int],
    tensor_parallel: tuple[int, int],
    replica: int,
    offsets: tuple[tuple[int, int, int], ...] = (),
) -> ShardedTensorFactory:
    """One expert's weight as its place in the stacked tensor w1 [E, H, 2, F] or w2 [E, F, H] of the torch backend.

    Args:
        parameter: [2 F, H] or [H, F].
        name: "w1" or "w2".
        key: key of the stacked tensor.
        expert: global index of the expert and E.
        tensor_parallel: this rank's place and the size of the tensor-parallel group.
        replica: number of this copy among data-parallel ones; 0 is written.
        offsets: axes that the caller put before.
    """
    view, back, axis = (w1_of, weight_of_w1, 3) if name == "w1" else (w2_of, weight_of_w2, 1)
    before = len(offsets)

    def build(key: str, data: Tensor, replica_id: ReplicaId, flattened: slice | None) -> list[ShardedTensor]:
        assert flattened is None, "optimizer state comes in the parameter's shape"
        return [
            ShardedTensor.from_rank_offsets(
                key,
                view(data),
                *offsets,
                (before, *expert),
                (before + axis, *tensor_parallel),
                replica_id=replica_id,
                prepend_axis_num=before,
            )
        ]

    def merge(parts: list[Tensor]) -> Tensor:
        return back(parts[0])

    return ShardedTensorFactory(key, parameter, build, merge, replica_id=(0, 0, replica))


class Scaling(NamedTuple):
    """State of delayed scaling of one module, as in its `fp8_meta`, on any device.

    Attributes:
        scale_fwd, scale_bwd: [3 G] and [2 G].
        amax_fwd, amax_bwd: amax histories, [A, 3 G] and [A, 2 G].
    """

    scale_fwd: Tensor
    amax_fwd: Tensor
    scale_bwd: Tensor
    amax_bwd: Tensor

    @classmethod
    def fresh(cls, products: int, history: int) -> Scaling:
        """Transformer-Engine's initial state: scales of one, empty histories."""
        return cls(
            torch.ones(FORWARD * products),
            torch.zeros(history, FORWARD * products),
            torch.ones(BACKWARD * products),
            torch.zeros(history, BACKWARD * products),
        )

    def packed(self, *, interleaved: bool) -> Tensor:
        """[1 + A, G, 5] fp32: scale in row 0, history below; three columns for forward, then two for backward.

        Args:
            interleaved: scales are ordered by product (Transformer-Engine 2.11's grouped linear): all tensors of the
                first product, then those of the second one. Otherwise all inputs come first, then all weights, and so
                on, which is what megatron-core 0.16.1 assumes when it splits them.
        """
        parts = []
        for scale, amax, kinds in ((self.scale_fwd, self.amax_fwd, FORWARD), (self.scale_bwd, self.amax_bwd, BACKWARD)):
            rows = torch.cat((scale.unsqueeze(0), amax)).float()
            shape = (rows.shape[0], -1, kinds) if interleaved else (rows.shape[0], kinds, rows.shape[1] // kinds)
            parts.append(rows.view(shape) if interleaved else rows.view(shape).transpose(1, 2))
        return torch.cat(parts, dim=2)

    @classmethod
    def unpacked(cls, packed: Tensor, *, interleaved: bool) -> Scaling:
        """The inverse of `packed`: from [1 + A, G, 5] fp32, with the same `interleaved`."""
        found = []
        for part in packed.split((FORWARD, BACKWARD), dim=2):
            rows = (part if interleaved else part.transpose(1, 2)).reshape(packed.shape[0], -1)
            found += [rows[0].clone(), rows[1:].clone()]
        return cls(*found)
