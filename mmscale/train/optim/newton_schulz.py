"""Newton-Schulz iteration: replaces the singular values of matrices by values near 1.

Pure arithmetic on stacks of matrices. muon.py is the optimizer that uses it.

Shapes: B matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of a chunk of a stack. X X^T, its square and two copies of X exist at the same time.
_CHUNK_HOST, _CHUNK_DEVICE = 1 << 22, 1 << 25
_LEAST_NORM = 1e-7  # a matrix with a smaller norm is not scaled up to 1: it may be rounding errors of a zero


@torch.no_grad()
def orthogonalized(
    stack_BRC: Tensor, *, steps: int, coefficients: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """U V^T of every matrix U S V^T, approximately: singular values become 0.7 to 1.2.

    The quintic iteration X <- a X + (b X X^T + c (X X^T)^2) X of Keller Jordan's Muon, for all matrices together. A
    matrix of zeros stays zero.

    Args:
        stack_BRC: [B, R, C], any dtype; not changed.
        steps: iterations.
        coefficients: a, b, c; larger `a` raises small singular values faster.
        dtype: of the products. Norms are computed in the stack's dtype.

    Returns:
        [B, R, C] in the stack's dtype.
    """
    rows, columns = stack_BRC.shape[-2:]
    most = _CHUNK_HOST if stack_BRC.is_cpu else _CHUNK_DEVICE
    chunks = stack_BRC.split(max(1, most // (rows * columns)))
    done = [_iterated(chunk, steps=steps, coefficients=coefficients, dtype=dtype) for chunk in chunks]
    return done[0] if len(done) == 1 else torch.cat(done)


def _iterated(stack_BRC: Tensor, *, steps: int, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    a, b, c = coefficients
    tall = stack_BRC.shape[-2] > stack_BRC.shape[-1]
    wide = stack_BRC.mT if tall else stack_BRC  # X X^T is then the smaller of the two products
    norm = wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    x = (wide / norm).to(dtype)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.to(stack_BRC.dtype)
    return x.mT if tall else x
