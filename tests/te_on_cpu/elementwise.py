"""RMSNorm, SwiGLU, and the functions of the fused optimizer: everything that is neither a product nor attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.te_on_cpu.enumerations import TORCH_TYPES, DType
from tests.te_on_cpu.quantization import quantize


def rmsnorm_fwd(
    input: Any, weight: Any, eps: float, ln_out: Any, quantizer: Any, otype: DType, sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:  # fmt: skip
    with torch.no_grad():
        x, gamma = input.float(), weight.float() + float(zero_centered_gamma)
        r = torch.rsqrt(x.square().mean(-1) + eps)
        y = (x * r.unsqueeze(-1) * gamma).to(TORCH_TYPES[otype])
        if quantizer is not None:
            y = quantize(y, quantizer, ln_out)
        elif ln_out is not None:
            y = ln_out.copy_(y)
    return [y, None, r]


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered: bool) -> list[Any]:
    with torch.no_grad():
        assert dz.is_contiguous() and x.is_contiguous() and dz.shape == x.shape and rsigma.shape == x.shape[:1]
        g = gamma.float() + float(zero_centered)
        normal = x.float() * rsigma.unsqueeze(-1)
        weighted = dz.float() * g
        dx = rsigma.unsqueeze(-1) * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
        return [dx.to(x.dtype), (dz.float() * normal).sum(0).to(gamma.dtype)]


def swiglu(input: Tensor, quantizer: Any) -> Any:
    gate, up = input.chunk(2, -1)
    return quantize(F.silu(gate) * up, quantizer)


def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: Any, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        if not torch.isfinite(source).all():
            is_infinite.fill_(1)
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk_size: int, noop: Tensor, tensor_lists: Any, per_tensor: bool | None = False) -> Any:
    norms = [t.detach().float().norm() for t in tensor_lists[0]]
    each = torch.stack(norms) if norms else torch.zeros(0)
    return each.norm().view(1), each if per_tensor else torch.zeros(0)


def multi_tensor_adam(
    chunk_size: int, noop: Tensor, tensor_lists: Any, lr: float, beta1: float, beta2: float, epsilon: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    one, two = (1.0 - beta1**step, 1.0 - beta2**step) if bias_correction else (1.0, 1.0)
    with torch.no_grad():
        for grad, parameter, m, v, *master in zip(*tensor_lists, strict=True):
            value, g = (master[0] if master else parameter).float(), grad.float()
            if mode == 0:
                g = g + weight_decay * value
            m.mul_(beta1).add_(g.to(m.dtype), alpha=1.0 - beta1)
            v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1.0 - beta2)
            update = (m.float() / one) / ((v.float() / two).sqrt() + epsilon)
            if mode == 1:
                update = update + weight_decay * value
            value = value - lr * update
            if master:
                master[0].copy_(value)
            parameter.copy_(value)


def multi_tensor_adam_param_remainder(
    chunk_size: int, noop: Tensor, tensor_lists: Any, lr: float, beta1: float, beta2: float, epsilon: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """bf16 parameters that are the rounded upper halves of fp32 ones; int16 tensors hold the lower halves."""
    with torch.no_grad():
        for grad, parameter, m, v, low in zip(*tensor_lists, strict=True):
            high = parameter.data.view(torch.int16)
            bits = torch.stack((low, torch.where(low < 0, high - 1, high)), dim=-1).contiguous()
            master = bits.view(torch.int32).view(torch.float32).reshape(parameter.shape)
            multi_tensor_adam(
                chunk_size, noop, [[grad], [master], [m], [v]], lr, beta1, beta2, epsilon, step, mode, bias_correction,
                weight_decay,
            )  # fmt: skip
            halves = master.contiguous().view(torch.int16).view(*parameter.shape, 2)
            low.copy_(halves[..., 0])
            high.copy_(torch.where(halves[..., 0] < 0, halves[..., 1] + 1, halves[..., 1]))
