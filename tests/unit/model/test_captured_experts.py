"""What a CUDA graph of experts captures, checked without one: nothing is read, and operators do not follow values.

A capture ends with an error where the host waits for the device, and a replay repeats the operators that it saw: what
follows values would be repeated wrongly. tests/gpu/test_gpu_step.py captures and replays on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.model.expert_compute import ExpertCompute, Products, feed_forward
from tests.device_reads import DeviceReads


class Operators(TorchDispatchMode):
    """Records every operator with the shapes and types of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensors = [item for item in args if isinstance(item, Tensor)]
        self.seen.append((str(func), *((tuple(item.shape), item.dtype) for item in tensors)))
        return func(*args, **(kwargs or {}))


def _inputs(seed: int) -> list[Tensor]:
    """Unlike values: the first experts get zeros, as from slots that nobody took."""
    made = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=made).bfloat16() for shape in ((4, 8, 16), (4, 16, 2, 32), (4, 32, 16))]
    found[0][: seed % 4].zero_()
    return [tensor.requires_grad_() for tensor in found]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("products", [kind for kind in Products if kind is not Products.TE])
def test_nothing_follows_values(products: Products, fused: bool) -> None:
    compute = ExpertCompute(products, fused=fused)
    recorded = []
    for seed in (0, 1, 3):
        inputs = _inputs(seed)
        with DeviceReads() as reads, Operators() as operators:
            feed_forward(*inputs, compute=compute).sum().backward()
        assert not reads.found
        recorded.append(operators.seen)
    assert len(recorded[0]) > 10
    assert recorded[0] == recorded[1] == recorded[2]
