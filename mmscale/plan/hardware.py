"""Figures of GPUs and of the machines around them that a plan reckons with. Data sheets, not measurements.

How much of a figure is reached is an assumption of timing.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One device in a machine of eight.

    Attributes:
        name: as people call it.
        memory: what is left of it for a process [GiB].
        bf16: dense tensor-core peak [FLOP/s].
        fp8: the same in FP8; None: it has none.
        fp32: peak without tensor cores [FLOP/s].
        bandwidth: of its memory [bytes/s].
        link: to the other devices of the machine, one direction [bytes/s].
        network: of its network adapter, one direction [bytes/s].
        per_node: devices of a machine.
        source: data sheets.
    """

    name: str
    memory: float
    bf16: float
    fp8: float | None
    fp32: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    source: str


GPUS = {
    "h100": Gpu(
        name="H100 SXM",
        memory=79.6,
        bf16=989.4e12,
        fp8=1978.9e12,
        fp32=66.9e12,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        per_node=8,
        source="NVIDIA H100 data sheet; NVLink 4; one 400 Gbit/s adapter each",
    ),
    "h200": Gpu(
        name="H200 SXM",
        memory=140.4,
        bf16=989.4e12,
        fp8=1978.9e12,
        fp32=66.9e12,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        per_node=8,
        source="NVIDIA H200 data sheet; NVLink 4; one 400 Gbit/s adapter each",
    ),
    "a100": Gpu(
        name="A100 SXM 80 GB",
        memory=79.3,
        bf16=312e12,
        fp8=None,
        fp32=19.5e12,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        per_node=8,
        source="NVIDIA A100 data sheet; NVLink 3; one 200 Gbit/s adapter each",
    ),
}
DEFAULT = "h100"


def gpu_named(name: str) -> Gpu:
    """A GPU by the name that `--gpu` takes.

    Raises:
        UsageError: no such name.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UsageError(f"--gpu {name}: no figures of it", remedy=f"use one of {', '.join(GPUS)}")
    return found
