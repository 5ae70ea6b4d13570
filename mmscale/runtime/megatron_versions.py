"""Differences between the supported versions of megatron-core, detected by feature.

0.16.1 is the version of every test run; docs/versions.md lists the other tested versions and how they were tested.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The file metadata.json of a checkpoint. 0.16 needs all four keys; from 0.17 on the last two are ignored.
CHECKPOINT_FORMAT: dict[str, Any] = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def grads_for_norm(optimizer: Any) -> list[Tensor]:
    """Gradients of an optimizer that count in the gradient norm, without copies of those of other ranks or stages.

    Args:
        optimizer: MegatronOptimizer; `get_main_grads_for_grad_norm` became `get_grads_for_grad_norm` in 0.19.
    """
    renamed = getattr(optimizer, "get_grads_for_grad_norm", None)
    found: list[Tensor] = optimizer.get_main_grads_for_grad_norm() if renamed is None else renamed()
    return found
