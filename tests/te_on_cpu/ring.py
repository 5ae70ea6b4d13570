"""Kernels of Transformer-Engine's ring over packed sequences (context_parallel.cu), by torch.

Rows are tokens of one rank, [T, ...]; `cu_seqlens` are the ends of its parts of sequences. Half of every part is an
early piece of the sequence, the other half a late one. Statistics are packed as [H, T], as with cuDNN 9.6 and newer.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def _rows(cu_seqlens: Tensor, half: int) -> Tensor:
    """Rows of the first (0) or second (1) half of every sequence, one sequence after another."""
    marks = cu_seqlens.tolist()
    found = []
    for begin, end in itertools.pairwise(marks):
        assert (end - begin) % 2 == 0, "a sequence is no multiple of 2 * cp"
        middle = (begin + end) // 2
        found.append(torch.arange(middle, end) if half else torch.arange(begin, middle))
    return torch.cat(found)


def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """[total_tokens / world_size] int32: the tokens of a rank (thd_partition_indices_kernel)."""
    ends = cu_seqlens.long() // world_size  # on a rank
    token = torch.arange(total_tokens // world_size)
    sequence = torch.searchsorted(ends[1:], token, right=True)
    half = (ends[sequence + 1] - ends[sequence]) // 2
    inside = token - ends[sequence]
    piece = torch.where(inside < half, rank, (world_size - 1) * 2 - rank)
    return (inside + ends[sequence] * world_size + half * piece).int()


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    return tensor[_rows(cu_seqlens, half_idx)]


def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Adds a step's statistics, those of the second halves only, to `lse`, in place."""
    assert lse_packed
    rows = _rows(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], lse_per_step)


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    assert lse_packed
    found = lse[:, _rows(cu_seqlens, 1)]
    assert found.shape[1] == second_half_lse_seqlen
    return found


def thd_out_correction(
    out: Tensor, out_per_step: Tensor, lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, only_second_half: bool,
    lse_packed: bool,
) -> None:  # fmt: skip
    """Adds a step's output to `out` in place, in the type of `out`."""
    assert lse_packed
    rows = _rows(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    share = torch.exp(lse_per_step[:, : len(rows)] - lse[:, rows]).t().unsqueeze(-1)
    step = out_per_step[: len(rows)].float()
    out[rows] = (out[rows].float() + step * share).to(out.dtype)


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Copies or adds a step's gradient into each half of `grad`; "none": the step has no rows of this half."""
    whole = "none" not in (first_half, second_half)
    for half, action in enumerate((first_half, second_half)):
        rows = _rows(cu_seqlens, half)
        step = grad_per_step[rows] if whole else grad_per_step
        if action == "copy":
            grad[rows] = step
        elif action == "add":
            grad[rows] += step
        else:
            assert action == "none"
