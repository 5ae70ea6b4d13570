"""RMSNorm with support for sequence parallelism, and the residual connection with a norm on the sub-layer's output.

mmscale always names its norm class explicitly, because megatron-core's local norms refuse sequence parallelism without
Transformer-Engine or apex (torch_norm.py), and select another class when `apex` can be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        config: says whether tokens are sharded over tensor-parallel ranks. If so the weight's gradient is partial, and
            megatron's finalize_model_grads sums it over them.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        replicated: every tensor-parallel rank has the whole input, so each computes the whole gradient. Each rank then
            contributes 1 / TP of its gradient to the sum: kernels whose sums have no fixed order (scatter on CUDA)
            would otherwise let the replicas drift apart, whereas the sum is the same on all ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, replicated: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if replicated and config.sequence_parallel:
            share = 1.0 / config.tensor_model_parallel_size
            self.weight.register_hook(lambda gradient: gradient * share)

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape [..., hidden_size], same out."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def norm_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of all norms, including those fused with a linear. Found by class, because a modality may have any name.

    A class of another backend has `is_norm = True`, or `has_norm = True` if it is a linear with a norm before it.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm) or getattr(type(module), "is_norm", False):
            yield from module.parameters()
        elif getattr(type(module), "has_norm", False):
            yield module.layer_norm_weight  # type: ignore[misc]  # a parameter, by Transformer-Engine's name


class Residual(nn.Module):
    """residual + dropout(norm(x)): fills megatron-core's bias-dropout-add slots of post-norm layers.

    Swin's placement, used by Chameleon-34B and MoMa (papers: 2405.09818 section 2.3, 2407.21770 section 2.2). Because
    it is a module in that slot, TransformerLayer's forward needs no change.
    """

    def __init__(
        self, norm_config: TransformerConfig | None = None, norm_class: type[nn.Module] = RMSNorm, **_: Any
    ) -> None:
        super().__init__()
        self.norm = (
            norm_class(norm_config, norm_config.hidden_size, norm_config.layernorm_epsilon)
            if norm_config is not None
            else None
        )

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that megatron-core's layer calls with (output, bias), residual and dropout probability."""
        del fused

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None, "mmscale's linears have no bias"
            if self.norm is not None:
                output = self.norm(output)
            if dropout > 0.0 and training:
                output = F.dropout(output, p=dropout)
            return residual + output

        return add
