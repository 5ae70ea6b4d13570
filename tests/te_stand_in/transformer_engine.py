"""Transformer-Engine 2.11's interface as far as megatron-core 0.16.1's wrappers and mmscale use it, in plain torch.

Transformer-Engine runs on CUDA only. With this module first on sys.path megatron-core's real wrappers and mmscale's
real classes run on a CPU, so what is shown there is theirs: constructor arguments, parameter names and attributes,
sharded state dicts, loading, gradients. Nothing is shown of Transformer-Engine's kernels: tests/gpu does that. FP8
state has its shapes and its way through state dicts, but nothing is quantised.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__version__ = "2.11.0"


class _Module(types.ModuleType):
    """A module whose missing names are classes that cannot be made: wrappers of them may be defined, not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(self: Any, *_: Any, **__: Any) -> None:
            raise NotImplementedError(f"the stand-in has no {name}")

        return type(name, (), {"__init__": refuse})


def _module(name: str, **content: Any) -> _Module:
    module = _Module(f"{__name__}.{name}")
    for key, value in content.items():
        setattr(module, key, value)
    sys.modules[module.__name__] = module
    return module


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Any = None
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False
    params_dtype: Any = None
    device: Any = None

    def delayed(self) -> bool:
        return True


@dataclass
class Float8CurrentScaling:
    fp8_format: Any = None
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling:
    fp8_format: Any = None


class _Format:
    E4M3, HYBRID, E5M2 = "e4m3", "hybrid", "e5m2"


class _State:
    """Scales and amax history of one direction."""

    def __init__(self, count: int, history: int) -> None:
        self.scale, self.amax_history = torch.ones(count), torch.zeros(history, count)


class _Base(nn.Module):
    """FP8 state in `fp8_meta` and its pickled way through `_extra_state`, as module/base.py of 2.11 has it."""

    gemms = 1

    def _start(self) -> None:
        nn.Module.__init__(self)
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        del num_gemms  # outside of an autocast context nothing is made

    def get_extra_state(self) -> Tensor:
        if not self.fp8_meta["fp8_checkpoint"]:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": self.fp8_meta["recipe"]})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        found = pickle.loads(state.numpy().tobytes())
        self.fp8_meta.update(found["extra_fp8_variables"])
        self.fp8_meta["recipe"] = found["recipe"]
        for key, name, kinds in (("scaling_fwd", "fwd", 3), ("scaling_bwd", "bwd", 2)):
            made = _State(kinds * self.fp8_meta["num_gemms"], found["recipe"].amax_history_len)
            made.scale.copy_(found[f"scale_{name}"])
            made.amax_history.copy_(found[f"amax_history_{name}"])
            self.fp8_meta[key] = made

    def _parameter(self, name: str, *shape: int, dtype: torch.dtype, device: Any, sharded: int | None) -> None:
        parameter = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        if sharded is not None:
            # set_tensor_model_parallel_attributes of transformer_engine/pytorch/distributed.py
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, sharded, 1
        self.register_parameter(name, parameter)


def _gather(x: Tensor, module: Any) -> Tensor:
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x, group=module.tp_group) if module.sequence_parallel else x


def _scatter(x: Tensor, module: Any) -> Tensor:
    from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

    return reduce_scatter_to_sequence_parallel_region(x, group=module.tp_group) if module.sequence_parallel else x


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        self._start()
        assert not bias and not return_bias, "the stand-in has no bias"
        del get_rng_state_tracker, rng_tracker_name, init_method, ub_name
        self.tp_group, self.fuse_wgrad_accumulation, self.parallel_mode = (
            tp_group,
            fuse_wgrad_accumulation,
            parallel_mode,
        )
        size = tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = size > 1 and sequence_parallel
        self.in_features = in_features // (size if parallel_mode == "row" else 1)
        self.out_features = out_features // (size if parallel_mode == "column" else 1)
        self.use_bias, self.tp_size, self.save_original_input = False, size, False
        self._weight(params_dtype or torch.float32, device)

    def _weight(self, dtype: torch.dtype, device: Any) -> None:
        sharded = 1 if self.parallel_mode == "row" else 0
        self._parameter("weight", self.out_features, self.in_features, dtype=dtype, device=device, sharded=sharded)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        del is_first_microbatch
        if self.parallel_mode == "column":
            return F.linear(_gather(inp, self), self.weight)
        return _scatter(F.linear(inp, self.weight), self)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **kwargs: Any,
    ) -> None:
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        super().__init__(in_features, out_features, **kwargs)
        self.eps = eps
        self._parameter(
            "layer_norm_weight", in_features, dtype=self.weight.dtype, device=self.weight.device, sharded=None
        )
        self.layer_norm_weight.data.fill_(1.0)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps), is_first_microbatch)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        self._start()
        assert not bias and not return_bias, "the stand-in has no bias"
        del sequence_parallel, get_rng_state_tracker, rng_tracker_name, init_method, ub_name
        assert tp_size == 1 and (tp_group is None or tp_group.size() == 1), "whoever calls it cuts the widths"
        self.num_gemms, self.fuse_wgrad_accumulation, self.use_bias = num_gemms, fuse_wgrad_accumulation, False
        self._num_fp8_tensors_per_gemm = {"fwd": 3, "bwd": 2}
        for index in range(num_gemms):
            self._parameter(
                f"weight{index}",
                out_features,
                in_features,
                dtype=params_dtype or torch.float32,
                device=device,
                sharded=1 if parallel_mode == "row" else 0,
            )

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        del is_first_microbatch
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == len(inp)
        rows = inp.split(m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(rows)])


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        del state

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attention_dropout == 0.0 and attn_mask_type == "causal"
        del (
            num_attention_heads,
            num_gqa_groups,
            sequence_parallel,
            tp_size,
            get_rng_state_tracker,
            tp_group,
            layer_number,
        )
        self.scale = softmax_scale or kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        assert attention_mask is None and cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return (
                self._one(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
                .permute(2, 0, 1, 3)
                .flatten(2)
            )
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and query.dim() == 3
        assert (
            cu_seqlens_q is not None and torch.equal(cu_seqlens_q, cu_seqlens_kv) and cu_seqlens_q.dtype == torch.int32
        )
        ends = cu_seqlens_q.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        assert min(lengths) >= 0 and max(lengths) <= max_seqlen_q == max_seqlen_kv and ends[-1] == len(query)
        out = [
            self._one(*(part.transpose(0, 1).unsqueeze(0) for part in parts)).squeeze(0).transpose(0, 1)
            for parts in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
            if len(parts[0])
        ]
        return torch.cat(out).flatten(1)

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def reset() -> None: ...


@contextlib.contextmanager
def fp8_autocast(enabled: bool, fp8_recipe: Any, fp8_group: Any) -> Iterator[None]:
    assert enabled and isinstance(fp8_recipe, DelayedScaling | Float8CurrentScaling | Float8BlockScaling)
    del fp8_group
    yield


recipe = _module(
    "common.recipe",
    DelayedScaling=DelayedScaling,
    Float8CurrentScaling=Float8CurrentScaling,
    Float8BlockScaling=Float8BlockScaling,
    Format=_Format,
)
common = _module("common", recipe=recipe)
pytorch = _module(
    "pytorch",
    Linear=Linear,
    LayerNormLinear=LayerNormLinear,
    GroupedLinear=GroupedLinear,
    RMSNorm=RMSNorm,
    DotProductAttention=DotProductAttention,
    fp8_autocast=fp8_autocast,
)
pytorch.fp8 = _module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)
# Names that megatron-core imports without asking; nothing of mmscale reaches them.
for _name in ("distributed", "ops", "router", "tensor", "float8_tensor"):
    setattr(pytorch, _name, _module(f"pytorch.{_name}"))
