"""How the matrices that Muon orthogonalises lie in the parameters of a tensor-parallel rank.

A *unit* is a contiguous range of a parameter that contains whole matrices, apart from tensor parallelism: one expert,
or a whole parameter that is no stack of experts. `MatrixLayout` joins the parts of tensor-parallel ranks and splits
the result into matrices, and the reverse. Nothing here communicates; matrix_exchange.py does.

Shapes: H hidden width, F inner width, E experts of this rank, TP tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.layers import LayerTensor, layer_tensors
from mmscale.layers.layer_tensor import Form
from mmscale.layers.matrices import MatrixStack, is_hidden_matrix, matrices_of

_IN_A_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)$")
# Transformer-Engine's grouped linear has one parameter for each expert: [2 F / TP, H] and [H, F / TP].
_EXPERT_OF_TE = re.compile(r"(?P<experts>.+)\.linear_fc(?P<number>[12])\.weight\d+$")


@dataclass(frozen=True)
class MatrixLayout:
    """The matrices of one parameter.

    Attributes:
        units: number of units, one after the other in memory.
        shape: of a unit's part on this rank, as it lies in memory.
        join_axis: the axis of `shape` along which the parts of tensor-parallel ranks are joined; None: every rank holds
            the whole unit.
        stacks: the matrices of a whole unit.
        heads: of queries, keys and values: (groups of heads, query heads of a group); None: of other weights.
        pair_axis: the axis of `shape` that distinguishes gate and up projection; None: there is no such axis.
    """

    units: int
    shape: tuple[int, ...]
    join_axis: int | None
    stacks: tuple[MatrixStack, ...]
    heads: tuple[int, int] | None = None
    pair_axis: int | None = None

    def matrices(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of a unit, one tensor [B, R, C] for each of `stacks`.

        Args:
            parts: flat part of each tensor-parallel rank, or one part if `join_axis` is None.
        """
        views = [part.view(self.shape) for part in parts]
        whole = views[0] if self.join_axis is None else torch.cat(views, dim=self.join_axis)
        if self.heads is not None:
            groups, queries = self.heads
            by_head = whole.view(groups, queries + 2, -1, whole.shape[-1])
            query = by_head[:, :queries].reshape(1, -1, whole.shape[-1])
            keys_values = by_head[:, queries:].transpose(0, 1).reshape(2, -1, whole.shape[-1])
            return [query, keys_values]
        return [whole.unsqueeze(0) if self.pair_axis is None else whole.movedim(self.pair_axis, 0)]

    def parts(self, matrices: Sequence[Tensor], *, ranks: int) -> list[Tensor]:
        """The inverse of `matrices`: flat parts, one for each of `ranks` tensor-parallel ranks."""
        if self.heads is not None:
            groups, queries = self.heads
            query, keys_values = matrices
            columns = query.shape[-1]
            heads = query.view(groups, queries, -1, columns)
            others = keys_values.view(2, groups, -1, columns).transpose(0, 1)
            whole = torch.cat((heads, others), dim=1).view(-1, columns)
        else:
            (stack,) = matrices
            whole = stack[0] if self.pair_axis is None else stack.movedim(0, self.pair_axis)
        found = [whole] if self.join_axis is None else whole.chunk(ranks, dim=self.join_axis)
        return [part.reshape(-1) for part in found]


def matrix_layouts(
    config: Config, named: Iterable[tuple[str, Tensor]], *, tensor_parallel: int
) -> dict[Tensor, MatrixLayout]:
    """The layout of every parameter that Muon updates.

    Args:
        config: gives the model.
        named: parameters of a rank's model by name, with any prefix before `decoder.`.
        tensor_parallel: TP.
    """
    table = {tensor.name: tensor for tensor in layer_tensors(config, depth=True) if is_hidden_matrix(tensor)}
    found: dict[Tensor, MatrixLayout] = {}
    for name, parameter in named:
        inside = _IN_A_LAYER.search(name)
        tensor = _tensor(inside.group(1), table) if inside else None
        if tensor is not None:
            found[parameter] = _layout(config, tensor, parameter, tensor_parallel)
    return found


def _tensor(name: str, table: Mapping[str, LayerTensor]) -> LayerTensor | None:
    """The table's entry for a parameter; for one expert of Transformer-Engine's, an entry of its shape and form."""
    if (one := _EXPERT_OF_TE.match(name)) is None:
        return table.get(name)
    stack = table[f"{one['experts']}.w{one['number']}"]
    if one["number"] == "1":
        hidden, inner = stack.shape[1], stack.shape[3]
        return replace(stack, shape=(2 * inner, hidden), form=Form.HALVES, tp_axis=0)
    inner, hidden = stack.shape[1:]
    return replace(stack, shape=(hidden, inner), form=Form.SAME, tp_axis=1)


def _layout(config: Config, tensor: LayerTensor, parameter: Tensor, tensor_parallel: int) -> MatrixLayout:
    shape, axis = tuple(parameter.shape), tensor.tp_axis if tensor_parallel > 1 else None
    if tensor.form is Form.HALVES:  # a rank has its gate rows, then its up rows
        shape, axis = (2, shape[0] // 2, shape[1]), None if axis is None else 1
        return MatrixLayout(1, shape, axis, tuple(matrices_of(config, tensor)), pair_axis=0)
    if len(shape) == 2:
        model = config.model
        heads = (model.query_groups, model.num_attention_heads // model.query_groups)
        of_heads: Any = {"heads": heads} if tensor.form is Form.QKV else {}
        return MatrixLayout(1, shape, axis, tuple(matrices_of(config, tensor)), **of_heads)
    one = replace(tensor, shape=(1, *tensor.shape[1:]))
    pair_axis = 1 if len(shape) == 4 else None
    axis = None if axis is None else axis - 1
    return MatrixLayout(shape[0], shape[1:], axis, tuple(matrices_of(config, one)), pair_axis=pair_axis)
