"""Measures the seconds of an operation: with CUDA events if it runs on a device, otherwise with the host's clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from mmscale.runtime import device


def seconds(work: Callable[[int], object], *, repeats: int, warmup: int = 3) -> list[float]:
    """Time `work(0)`, `work(1)`, ... one by one, after some calls that are not timed.

    On CUDA all repeats are queued before the first wait, so that the host's time is hidden as in training.

    Args:
        work: called with the number of the call, so that it can rotate its inputs through more memory than caches hold.
        repeats: calls that are timed.
        warmup: calls before them, in which kernels are chosen and compiled.
    """
    for number in range(warmup):
        work(number)
    device.synchronize()
    if not device.has_cuda():
        found = []
        for number in range(repeats):
            begin = time.perf_counter()
            work(number)
            found.append(time.perf_counter() - begin)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for number in range(repeats):
        work(number)
        marks[number + 1].record()
    device.synchronize()
    return [marks[i].elapsed_time(marks[i + 1]) / 1e3 for i in range(repeats)]


def release() -> None:
    """Free cached device memory, so that the next measurement starts with all of it. A no-op on a CPU."""
    if device.has_cuda():
        gc.collect()
        torch.cuda.empty_cache()


def full_precision() -> None:
    """Compute fp32 products in fp32 instead of TF32, for references."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
