"""Measures in half a second how fast this machine's CPU multiplies matrices, for estimates of training time."""

from __future__ import annotations

import os
import time

import numpy as np
from threadpoolctl import threadpool_limits

_EDGE = 384
_SECONDS = 0.4


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def flops_of_a_core() -> float:
    """FLOP/s of one core on fp32 matrix products of middle size, the best of several."""
    left = np.ones((_EDGE, _EDGE), np.float32)
    best, end = 0.0, time.perf_counter() + _SECONDS
    with threadpool_limits(1):
        while time.perf_counter() < end:
            begin = time.perf_counter()
            left @ left
            best = max(best, 2 * _EDGE**3 / (time.perf_counter() - begin))
    return best
