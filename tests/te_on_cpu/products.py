"""Matrix products. An operand in FP8 is read only from the data that a Hopper kernel would read.

Row-wise data for one side, column-wise for the other: a layer that did not make or keep the data that its product needs
fails here as it would on a GPU. So do widths that cuBLAS refuses in FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.enumerations import MACHINE, TORCH_TYPES, DType
from tests.te_on_cpu.quantization import uncast


def _operand(tensor: Any, rowwise: bool) -> tuple[Tensor, bool]:
    """A factor as [rows, columns] fp32 or in its own type, from the data that a Hopper kernel would read; is it FP8."""
    if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "_quantizer"):
        return tensor.detach().reshape(-1, tensor.shape[-1]), False
    if hasattr(tensor, "_scale_inv"):
        if rowwise:
            assert tensor._data is not None, "product needs row-wise FP8 data, which is not there"
            return uncast(tensor._data.reshape(-1, tensor._data.shape[-1]), tensor._fp8_dtype) * tensor._scale_inv, True
        assert tensor._transpose is not None and not tensor._transpose_invalid, (
            "product needs column-wise FP8 data, which is not there"
        )
        turned = tensor._transpose.reshape(tensor._transpose.shape[0], -1)
        return (uncast(turned, tensor._fp8_dtype) * tensor._scale_inv).t(), True
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage as Storage,
    )

    assert isinstance(tensor, Storage), type(tensor)
    row, column = tensor._rowwise_data, tensor._columnwise_data
    assert (row if rowwise else column) is not None, "product needs blockwise FP8 data that is not there"
    hidden = ("columnwise_data", "columnwise_scale_inv") if rowwise else ("rowwise_data", "rowwise_scale_inv")
    only = Storage(**{**tensor.get_metadata(), **dict.fromkeys(hidden)})
    values = only.dequantize(dtype=torch.float32)
    return values.reshape(-1, values.shape[-1]), True


def _product(a: Any, trans_a: bool, b: Any, trans_b: bool, out_type: torch.dtype) -> Tensor:
    """op(B) op(A), row-major; what cuBLAS refuses in FP8 is refused."""
    left, fp8_b = _operand(b, rowwise=not trans_b)
    right, fp8_a = _operand(a, rowwise=trans_a)
    assert fp8_a == fp8_b, "one factor is FP8 and the other is not"
    left = left.t() if trans_b else left
    right = right.t() if trans_a else right
    assert left.shape[1] == right.shape[0], (tuple(left.shape), tuple(right.shape))
    if fp8_a:
        assert left.shape[1] % 16 == 0, f"FP8 product over {left.shape[1]}: no multiple of 16"
        assert right.shape[1] % 8 == 0, f"FP8 product with {right.shape[1]} columns: no multiple of 8"
    if out_type == torch.float32 and left.dtype != torch.float32:
        left, right = left.float(), right.float()  # fp32 sums, not rounded to bf16 between
    assert left.dtype == right.dtype, (left.dtype, right.dtype)
    return (left @ right).to(out_type)


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Tensor | None,
    bias_type: DType, gelu: bool, gelu_in: Tensor | None, grad: bool, workspace: Tensor, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Tensor | None = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> list[Any]:  # fmt: skip
    assert not gelu and comm_overlap is None and quantizer is None, "te_on_cpu: neither GELU, overlap nor FP8 output"
    assert isinstance(workspace, Tensor) and workspace_size == workspace.shape[0]
    with torch.no_grad():
        out_type = TORCH_TYPES[output_dtype] if output_dtype is not None else (D.dtype if D is not None else B.dtype)
        found = _product(A, transA, B, transB, out_type) * (1.0 if alpha == 1.0 else alpha)
        bias_grad = None
        if bias is not None and not grad:
            found += bias
        elif bias is not None and bias.numel():
            dy, _ = _operand(B, rowwise=not transB)
            bias_grad = dy.sum(0).to(bias.dtype)
        if D is None:
            shape = found.shape if transB else (*B.size()[:-1], found.shape[1])
            return [found.view(shape), bias_grad, gelu_in, extra_output]
        if accumulate:
            D.add_(found.view(D.shape))
        else:
            D.copy_(found.view(D.shape))
    return [D, bias_grad, gelu_in, extra_output]


def te_general_grouped_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, D_type: DType, m_splits: Any, bias: Any, bias_type: DType,
    single_output: bool, pre_gelu_out: Any, grad: bool, workspace: Any, workspaceSize: int, accumulate: bool,
    use_split_accumulator: bool, math_sm_count: int,
) -> Any:  # fmt: skip
    assert len(workspace) == get_num_cublas_streams()
    with torch.no_grad():
        outputs = D[0].split(list(m_splits)) if single_output else D
        assert len(A) == len(B) == len(outputs)
        for a, b, out in zip(A, B, outputs, strict=True):
            if b.size(0) == 0 if isinstance(b, Tensor) else b.size()[0] == 0:
                if out.numel() and not accumulate:
                    out.zero_()
                continue
            found = _product(a, transA, b, transB, out.dtype)
            out.add_(found) if accumulate else out.copy_(found.view(out.shape))
    return bias


def get_num_cublas_streams() -> int:
    return 4


def get_cublasLt_version() -> int:
    return MACHINE.cublaslt


def get_cudnn_version() -> int:
    return MACHINE.cudnn
