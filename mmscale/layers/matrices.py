"""Which weights of a layer are matrices that Muon orthogonalises, and the shapes of these matrices.

Muon (optim.optimizer = muon) is for hidden layers: projections of attention, feed-forward layers, experts and shared
experts. Embedding, output layer, routers, norms and biases are updated by AdamW, as in Keller Jordan's Muon and in
Moonlight (arXiv 2502.16982). A stored weight can hold several matrices: queries, keys and values are three, gate and
up projection are two, and a stack of experts has one of each for every expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import Config
from mmscale.layers.layer_tensor import Form, LayerTensor, TensorPart

# Elements of a rank's shards that are exchanged and orthogonalised together: 0.5 GiB in fp32.
ROUND_ELEMENTS = 1 << 27
# fp32 copies of them that exist at the same time: momentum, messages, whole matrices, their stacks and the results.
ROUND_COPIES = 6
_HIDDEN = (TensorPart.ATTENTION, TensorPart.FFN, TensorPart.EXPERTS, TensorPart.SHARED)


@dataclass(frozen=True)
class MatrixStack:
    """Equal matrices.

    Attributes:
        count: how many.
        rows, columns: of each.
    """

    count: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.count * self.rows * self.columns


def is_hidden_matrix(tensor: LayerTensor) -> bool:
    """Whether Muon updates a weight; otherwise AdamW does."""
    return tensor.part in _HIDDEN and len(tensor.shape) > 1


def matrices_of(config: Config, tensor: LayerTensor) -> list[MatrixStack]:
    """The matrices of a weight, unsharded.

    Args:
        config: gives the heads of attention.
        tensor: a weight for which `is_hidden_matrix` is true.
    """
    shape = tensor.shape
    if tensor.form is Form.QKV:
        keys = config.model.query_groups * config.model.head_dim
        return [MatrixStack(1, shape[0] - 2 * keys, shape[1]), MatrixStack(2, keys, shape[1])]
    if tensor.form is Form.HALVES:
        return [MatrixStack(2, shape[0] // 2, shape[1])]
    if len(shape) == 4:  # gate and up projections of experts: [E, H, 2, F]
        return [MatrixStack(2 * shape[0], shape[1], shape[3])]
    return [MatrixStack(shape[0] if len(shape) == 3 else 1, *shape[-2:])]


def newton_schulz_flops(rows: int, columns: int, *, steps: int) -> float:
    """FLOPs to orthogonalise a matrix: three products a step, of the shorter side a and the longer side b.

    X X^T and the final product with X are 2 a^2 b each, the square of X X^T is 2 a^3.
    """
    short, long = sorted((rows, columns))
    return steps * (4.0 * short * short * long + 2.0 * short**3)
