"""The device of this rank. What needs a GPU is in tests/gpu."""

import os
import platform
import random
import subprocess
import sys
import time

import numpy
import pytest
import torch

from mmscale.errors import ConfigError
from mmscale.runtime import device


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_host_without_cuda() -> None:
    assert device.current_device(3) == torch.device("cpu")
    assert device.backend() == "gloo"
    assert device.device_name()
    device.synchronize()


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["0", "1", "2", "0"]),
        ("5,3,6", ["5", "3", "6", "5"]),
        ("GPU-a,GPU-b,MIG-c", ["GPU-a", "GPU-b", "MIG-c", "GPU-a"]),
    ],
)
def test_independent_processes_share_the_devices(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[str]
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for number, name in enumerate(seen):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        device.see_only(number)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_nothing_is_hidden_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device.see_only(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_seeds_reach_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(1))

    device.set_seeds(2**40 + 1)
    first = draw()
    assert draw() != first
    device.set_seeds(2**40 + 1)
    assert draw() == first


def test_a_timer_has_seconds_once_both_marks_are_set() -> None:
    timer = device.Timer()
    assert timer.seconds() is None
    timer.begin()
    assert timer.seconds() is None
    before = time.perf_counter()
    while time.perf_counter() - before < 0.01:
        torch.randn(64).sum().item()
    timer.end()
    first = timer.seconds()
    assert first is not None and first >= 0.01
    assert timer.seconds() == first  # it does not run on
    timer.begin()
    assert timer.seconds() is None


def _pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    return taken


def test_local_rank_is_the_index_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _pretend_gpus(monkeypatch, 8)
    assert device.current_device(5) == torch.device("cuda", 5)
    assert taken == [5]
    assert device.backend() == "nccl"


def test_rank_with_its_own_view_takes_device_0(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _pretend_gpus(monkeypatch, 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert device.current_device(5) == torch.device("cuda", 0)
    assert taken == [0]


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match="local rank 2 has no CUDA device: 2 visible on this node; start at most one"):
        device.current_device(2)


@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="about glibc on hosts")
def test_freed_memory_is_kept() -> None:
    """A block of 64 MB that was freed soon costs no page faults any more."""
    program = """
import resource, torch
from mmscale.runtime import device
KEEP = device.keep_host_memory()
for _ in range(40):  # a few blocks are taken before freed ones fit again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert KEEP and faults < 1000, faults
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
