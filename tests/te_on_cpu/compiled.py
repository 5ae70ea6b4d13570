"""The module `transformer_engine_torch`: the functions of this folder, and names that refuse when they are called.

`CALLS` counts calls by function, for tests that check which kernels a step uses.
"""

from __future__ import annotations

import functools
import importlib.machinery
import types
import zlib
from collections import Counter
from typing import Any

from packaging.version import Version

from tests.te_on_cpu import attention, elementwise, enumerations, package, products, quantization, ring, signatures

CALLS: Counter[str] = Counter()

_ENUMERATIONS = (
    "DType",
    "FP8FwdTensors",
    "FP8BwdTensors",
    "NVTE_Fused_Attn_Backend",
    "Float8BlockScaleTensorFormat",
    "CommOverlapType",
    "NVTE_Bias_Type",
    "NVTE_Mask_Type",
    "NVTE_Softmax_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "CommOverlapAlgo",
    "NVTEScalingMode",
)
_FUNCTIONS: dict[types.ModuleType, tuple[str, ...]] = {
    quantization: (
        "quantize",
        "create_empty_quantized_tensor",
        "split_quantize",
        "bgrad_quantize",
        "dequantize",
        "fp8_transpose",
        "compute_amax",
        "fused_amax_and_scale_update_after_reduction",
    ),
    products: (
        "generic_gemm",
        "te_general_grouped_gemm",
        "get_num_cublas_streams",
        "get_cublasLt_version",
        "get_cudnn_version",
    ),
    elementwise: (
        "rmsnorm_fwd",
        "rmsnorm_bwd",
        "swiglu",
        "multi_tensor_scale",
        "multi_tensor_l2norm",
        "multi_tensor_adam",
        "multi_tensor_adam_param_remainder",
    ),
    attention: (
        "get_fused_attn_backend",
        "fused_attn_fwd",
        "fused_attn_bwd",
        "convert_thd_to_bshd",
        "convert_bshd_to_thd",
    ),
    ring: (
        "thd_get_partitioned_indices",
        "thd_read_half_tensor",
        "thd_second_half_lse_correction",
        "thd_read_second_half_lse",
        "thd_out_correction",
        "thd_grad_correction",
    ),
}

# The other names of version 2.11: `from transformer_engine_torch import *` must find them.
_OTHERS = """
    bulk_overlap_ag_with_external_gemm clamped_dswiglu clamped_swiglu copy_to_kv_cache create_nvshmem_tensor dbias_dgelu
    dbias_dqgelu dbias_drelu dbias_dsilu dbias_dsrelu device_supports_multicast dgeglu dgelu dqgeglu dqgelu dreglu drelu
    dropout_bwd dropout_fwd dsilu dsreglu dsrelu dswiglu fa_prepare_bwd fa_prepare_fwd
    fp8_block_scaling_compute_partial_amax fp8_block_scaling_partial_cast fused_moe_aux_loss_bwd fused_moe_aux_loss_fwd
    fused_multi_row_padding fused_multi_row_unpadding fused_qkv_rope_backward fused_qkv_rope_forward fused_rope_backward
    fused_rope_forward fused_score_for_moe_aux_loss_bwd fused_score_for_moe_aux_loss_fwd
    fused_topk_with_score_function_bwd fused_topk_with_score_function_fwd geglu gelu get_stream_priority_range
    init_nvshmem_backend layernorm_bwd layernorm_fwd moe_permute_bwd moe_permute_fwd moe_unpermute_bwd moe_unpermute_fwd
    multi_tensor_adam_capturable multi_tensor_adam_capturable_master multi_tensor_adam_fp8
    multi_tensor_compute_scale_and_scale_inv multi_tensor_compute_scale_inv_e8m0
    multi_tensor_quantize multi_tensor_sgd multi_tensor_unscale_l2norm mxfp8_scaling_compute_partial_amax
    mxfp8_scaling_partial_cast nvshmem_finalize nvshmem_send_on_current_stream nvshmem_wait_on_current_stream qgeglu
    qgelu reglu relu rmsnorm_bwd_add scaled_aligned_causal_masked_softmax_backward
    scaled_aligned_causal_masked_softmax_forward scaled_masked_softmax_backward scaled_masked_softmax_forward
    scaled_softmax_backward scaled_softmax_forward scaled_upper_triang_masked_softmax_backward
    scaled_upper_triang_masked_softmax_forward silu sreglu srelu swap_first_dims
    ubuf_built_with_mpi CommOverlap CommOverlapBase CommOverlapCore CommOverlapHelper CommOverlapP2P CommOverlapP2PBase
    FP8TensorMeta
"""


class _Members(type):
    """Of a class with any members, which are different numbers: enumerations that are imported and not used."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return zlib.crc32(name.encode())


class Compiled(types.ModuleType):
    """A module whose missing names are empty classes, and functions that refuse when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return _Members(name, (), {})

        def refuse(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"te_on_cpu has no {self.__name__}.{name}")

        return refuse


def _counted(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def compiled() -> types.ModuleType:
    """A new `transformer_engine_torch`."""
    module = Compiled("transformer_engine_torch")
    module.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    for name in _ENUMERATIONS:
        setattr(module, name, getattr(enumerations, name))
    if package.version() >= Version("2.16"):
        module.NVTE_Fused_Attn_Backend = enumerations.NVTE_Fused_Attn_Backend_2_16  # type: ignore[attr-defined]
    for home, names in _FUNCTIONS.items():
        for name in names:
            function = getattr(home, name)
            if name in signatures.BY_NAME:
                function = signatures.named(function, package.version())
            setattr(module, name, _counted(function))
    for name in _OTHERS.split():
        setattr(module, name, getattr(module, name))
    return module
