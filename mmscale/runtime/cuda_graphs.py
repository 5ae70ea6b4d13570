"""Captures functions of static shapes as CUDA graphs: one launch each for forward and backward.

torch.cuda.make_graphed_callables does the work. Not usable for functions that read from the device or communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mmscale.errors import ConfigError
from mmscale.runtime import device


class Captured:
    """A differentiable function of an input and of weights, captured when first called with gradients.

    The graph uses the memory of the weights, which may change in place, as by optimizers. It keeps the activations of
    one call, so a call's backward must come before the next call with gradients (one micro-batch in flight). Calls
    without gradients, or of another shape or type, are not captured.

    Args:
        function: takes the input and the weights, returns one tensor.

    Raises:
        ConfigError: there is no CUDA device.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        if not device.has_cuda():
            raise ConfigError(
                "CUDA graphs were asked for, but this machine has no CUDA device",
                remedy="set model.experts.cuda_graph=false",
            )
        self.function = function
        self.graph: Callable[..., Tensor] | None = None
        self.key: tuple[object, ...] = ()

    def __call__(self, given: Tensor, *weights: Tensor) -> Tensor:
        """Replay, or capture and replay, or call."""
        if not (torch.is_grad_enabled() and given.requires_grad and given.is_cuda):
            return self.function(given, *weights)
        # Loading a checkpoint copies in place. If a weight's memory has moved, a new graph is captured.
        key = (given.shape, given.dtype, *(weight.data_ptr() for weight in weights))
        if self.graph is None:
            self.graph, self.key = self._capture(given, weights), key
        return self.graph(given, *weights) if key == self.key else self.function(given, *weights)

    def _capture(self, given: Tensor, weights: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        # Detached views of the weights: they have the same memory, so a replay copies nothing, and the gradient hooks
        # of data parallelism do not run during the capture.
        sample = (torch.zeros_like(given), *(weight.detach() for weight in weights))
        for tensor in sample:
            tensor.requires_grad_()
        return cast(Callable[..., Tensor], torch.cuda.make_graphed_callables(self.function, sample))
