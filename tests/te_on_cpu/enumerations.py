"""Enumerations of Transformer-Engine's compiled module, with its values, and the simulated machine.

Names and values are the interface that the package's Python was written against; its code is not included.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Machine:
    """The GPU and libraries that the compiled functions report.

    Attributes:
        capability: compute capability; (9, 0) is Hopper, (8, 0) Ampere.
        cudnn, cublaslt, cuda: versions, as the libraries number them.
    """

    capability: tuple[int, int] = (9, 0)
    cudnn: int = 91900
    cublaslt: int = 130100
    cuda: str = "13.0"


MACHINE = Machine()


class DType(enum.IntEnum):
    kByte, kInt32, kFloat32, kFloat16, kBFloat16 = 0, 2, 4, 5, 6
    kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 7, 8, 10


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT = 0, 1, 2
    GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = 3, 4, 5
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = 6, 7, 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend, NVTE_F16_max512_seqlen, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 0, 1, 2


NVTE_Fused_Attn_Backend_2_16 = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {kind.name: int(kind) for kind in NVTE_Fused_Attn_Backend if kind.name != "NVTE_F16_max512_seqlen"},
)


class Float8BlockScaleTensorFormat(enum.IntEnum):
    GEMM_READY, COMPACT = 0, 1


class CommOverlapType(enum.IntEnum):
    RS, AG = 0, 1


def _numbered(name: str, *names: str, start: int = 0) -> Any:
    return enum.IntEnum(name, {n: i + start for i, n in enumerate(names)})


NVTE_Bias_Type = _numbered(
    "NVTE_Bias_Type", "NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"
)
NVTE_Mask_Type = _numbered(
    "NVTE_Mask_Type", *(f"NVTE_{n}" for n in (
        "NO_MASK", "PADDING_MASK", "CAUSAL_MASK", "PADDING_CAUSAL_MASK", "CAUSAL_BOTTOM_RIGHT_MASK",
        "PADDING_CAUSAL_BOTTOM_RIGHT_MASK"))
)  # fmt: skip
NVTE_Softmax_Type = _numbered(
    "NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"
)
NVTE_QKV_Format = _numbered(
    "NVTE_QKV_Format", *(f"NVTE_{n}" for n in (
        "SBHD", "BSHD", "THD", "BSHD_2SBHD", "SBHD_2BSHD", "THD_2BSHD", "THD_2SBHD", "BHSD",
        "QKV_Format_NOT_SET"))
)  # fmt: skip
NVTE_QKV_Layout = _numbered(
    "NVTE_QKV_Layout", *(f"NVTE_{n}" for n in (
        "SB3HD", "SBH3D", "SBHD_SB2HD", "SBHD_SBH2D", "SBHD_SBHD_SBHD",
        "BS3HD", "BSH3D", "BSHD_BS2HD", "BSHD_BSH2D", "BSHD_BSHD_BSHD",
        "T3HD", "TH3D", "THD_T2HD", "THD_TH2D", "THD_THD_THD",
        "SBHD_BSHD_BSHD", "BSHD_SBHD_SBHD", "THD_BSHD_BSHD", "THD_SBHD_SBHD",
        "Paged_KV_BSHD_BSHD_BSHD", "Paged_KV_BSHD_SBHD_SBHD", "Paged_KV_SBHD_BSHD_BSHD",
        "Paged_KV_SBHD_SBHD_SBHD", "Paged_KV_THD_BSHD_BSHD", "Paged_KV_THD_SBHD_SBHD",
        "BHSD_BHSD_BHSD", "QKV_Layout_NOT_SET"))
)  # fmt: skip
NVTEScalingMode = _numbered(
    "NVTEScalingMode", "NVTE_DELAYED_TENSOR_SCALING", "NVTE_MXFP8_1D_SCALING", "NVTE_BLOCK_SCALING_1D",
    "NVTE_BLOCK_SCALING_2D", "NVTE_NVFP4_1D_SCALING"
)  # fmt: skip
CommOverlapAlgo = _numbered(
    "CommOverlapAlgo", "BULK_OVERLAP_AG", "BULK_OVERLAP_RS", "SPLIT_PIPELINED_AG_P2P", "SPLIT_PIPELINED_RS",
    "SPLIT_PIPELINED_RS_P2P", "ATOMIC_GEMM_RS", "ATOMIC_GEMM_AG_P2P", "ATOMIC_GEMM_RS_P2P", "EXTERNAL_BULK_OVERLAP_AG",
)  # fmt: skip

TORCH_TYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}
