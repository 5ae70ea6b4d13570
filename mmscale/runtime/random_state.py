"""The random state of this rank: Python's, NumPy's, torch's on host and device, and megatron-core's trackers.

It is split into tensors and numbers, so that no classes need to be pickled. Independent of checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mmscale.runtime import device, groups

from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed  # isort: skip


def capture() -> dict[str, Any]:
    """Everything that this rank's random numbers depend on, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.has_cuda() else None,
        "megatron": {key: value.clone() for key, value in get_cuda_rng_tracker().get_states().items()},
    }


def restore(state: dict[str, Any]) -> None:
    """Restore the result of `capture`."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if device.has_cuda() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states({key: value.clone() for key, value in state["megatron"].items()})


def reseed(seed: int, step: int) -> int:
    """Seed a rank whose state was not saved, reproducibly; returns the seed of this rank.

    Ranks of a tensor-parallel group have the same seed, because they share activations with dropout; megatron's tracker
    makes their random numbers differ where necessary.
    """
    place = f"{seed}:{step}:{groups.data_parallel_rank()}:{groups.pipeline_rank()}"
    if groups.context_parallel_size() > 1:
        place += f":{groups.context_parallel_rank()}"
    mixed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1
    device.set_seeds(mixed)
    model_parallel_cuda_manual_seed(mixed, force_reset_rng=True)
    return mixed


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Random numbers drawn inside do not affect those drawn afterwards."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
