"""The device that this rank computes on.

CUDA or CPU, decided in one place: the device of this rank, its memory, its name, its random seed. The only module of
the package that uses torch.cuda; it starts no process group and is independent of megatron-core.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import time
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray

from mmscale.errors import ConfigError


def has_cuda() -> bool:
    """Whether this machine has a CUDA device that torch can use."""
    return torch.cuda.is_available()


def backend() -> Literal["nccl", "gloo"]:
    """The torch.distributed backend that moves this device's tensors."""
    return "nccl" if has_cuda() else "gloo"


def current_device(local_rank: int = 0) -> torch.device:
    """Select the device of this rank for the process and return it.

    Args:
        local_rank: Index of this rank on its node.

    Raises:
        ConfigError: More ranks on this node than devices that they can see.
    """
    if not has_cuda():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # With `--gpus-per-task=1` every rank sees only its own device, as number 0, so the local rank is not an index.
    index = 0 if count == 1 and _one_device_each() else local_rank
    if index >= count:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device: {count} visible on this node",
            remedy="start at most one rank per GPU, or check CUDA_VISIBLE_DEVICES",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def count() -> int:
    """Number of CUDA devices that this process can use."""
    return torch.cuda.device_count() if has_cuda() else 0


def numbered(number: int) -> torch.device:
    """The CUDA device of one of several independent processes, for work outside of training.

    Args:
        number: of the process; processes beyond the number of devices share them.

    Raises:
        ConfigError: this machine has no CUDA device.
    """
    if not has_cuda():
        raise ConfigError(
            f"a GPU was asked for, and torch sees none on {platform.node()}",
            remedy="`mmscale doctor` says why; or leave --gpus out",
        )
    return torch.device("cuda", number % torch.cuda.device_count())


def see_only(number: int) -> None:
    """Hide all CUDA devices but one from this process, which has not used any yet. Without CUDA nothing happens.

    Args:
        number: of this process among independent ones; processes beyond the number of devices share them.
    """
    found = torch.cuda.device_count() if has_cuda() else 0
    if found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % found]


def _one_device_each() -> bool:
    """Whether the launcher gave each rank its own view of the devices (SLURM names the number per task)."""
    return "SLURM_GPUS_PER_TASK" in os.environ or "SLURM_TRES_PER_TASK" in os.environ


def taken() -> torch.device:
    """The device that this process selected with `current_device` (CUDA's current one), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def processors() -> int:
    """Devices of this machine that the process sees; without CUDA the CPU cores that it may use."""
    return torch.cuda.device_count() if has_cuda() else len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory of the device, or of this machine without CUDA."""
    if has_cuda():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_name() -> str:
    """Name of the device, from `torch.cuda` or the kernel."""
    if has_cuda():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"


def synchronize() -> None:
    """Wait for all work queued on the device. Nothing is queued on a CPU."""
    if has_cuda():
        torch.cuda.synchronize()


class Timer:
    """Seconds between two points of the device's queue, without a wait: events are queued like kernels.

    Only the current stream is measured; parallel streams (NCCL's) are not waited for. An event is reached when all work
    queued before it is done, and not before the host has recorded it. On a CPU: the host's clock.
    """

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event | float | None] = [None, None]

    def begin(self) -> None:
        """Record the first event, and reset the second."""
        self._marks = [self._mark(), None]

    def end(self) -> None:
        """Record the second event."""
        self._marks[1] = self._mark()

    @staticmethod
    def _mark() -> torch.cuda.Event | float:
        if not has_cuda():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float | None:
        """Seconds between the events; None without both. The device must have reached them, by a later wait."""
        first, second = self._marks
        if first is None or second is None:
            return None
        if isinstance(first, float) or isinstance(second, float):
            assert isinstance(first, float) and isinstance(second, float)
            return second - first
        return first.elapsed_time(second) / 1000.0


def keep_host_memory() -> bool:
    """Keep freed memory in this process. A no-op with CUDA, or if the C library is not glibc.

    By default glibc returns blocks above 32 MB to the kernel and requests them again, page by page: up to a quarter of
    the CPU time of a training step with tensors of that size.

    Returns:
        Whether freed memory is kept from now on.
    """
    if has_cuda() or platform.libc_ver()[0] != "glibc":
        return False
    keep, map_threshold, trim_threshold = 2**31 - 1, -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(map_threshold, keep)) and bool(mallopt(trim_threshold, keep))


def give_back_host_memory() -> bool:
    """Return every freed block above 1 MiB to the kernel at once, for tools that stream large tensors.

    By default glibc raises that limit to the size of freed blocks (up to 32 MiB), and keeps blocks below it: reading
    tensors of 24 MiB one by one then took 168 MiB instead of 76.

    Returns:
        Whether blocks are returned from now on; False if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    map_threshold, limit = -3, 1 << 20  # M_MMAP_THRESHOLD of malloc.h; setting it stops its growth
    return bool(ctypes.CDLL(None).mallopt(map_threshold, limit))


def upload(array: NDArray[Any], where: torch.device) -> torch.Tensor:
    """Copy a host array to a device without waiting for the device's pending work."""
    found = torch.from_numpy(array)
    if where.type == "cuda":
        found = found.pin_memory()  # copies from pageable memory may wait
    return found.to(where, non_blocking=True)


def set_seeds(seed: int) -> None:
    """Seed Python, NumPy and torch on host and device. Megatron's own trackers: `groups.initialize_layout`."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # also seeds every CUDA device
