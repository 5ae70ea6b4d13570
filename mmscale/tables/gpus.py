"""Data-sheet figures of GPUs and of the machines around them; not measurements.

mmscale.plan.timing assumes which fraction of a figure is reached. The MFU of a run uses the peaks of this module too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmscale.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One device in a machine of eight.

    Attributes:
        name: common name.
        memory: available to a process [GiB].
        bf16: dense tensor-core peak [FLOP/s].
        fp8: the same in FP8; None: not supported.
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
    "b200": Gpu(
        name="B200 SXM",
        memory=179.0,
        bf16=2250e12,
        fp8=4500e12,
        fp32=75e12,
        bandwidth=7.67e12,
        link=900e9,
        network=50e9,
        per_node=8,
        source="NVIDIA HGX and DGX B200 data sheets; bandwidth: bus of 7,680 bits at 3,996 MHz; NVLink 5; one "
        "400 Gbit/s adapter each",
    ),
    "gb200": Gpu(
        name="GB200 NVL72",
        memory=185.0,
        bf16=2500e12,
        fp8=5000e12,
        fp32=80e12,
        bandwidth=8.0e12,
        link=900e9,
        network=50e9,
        per_node=4,
        source="NVIDIA GB200 NVL72 data sheet; NVLink 5; one 400 Gbit/s adapter each; trays of 4 count as machines, "
        "though NVLink joins 72 devices",
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
# Dense bf16 tensor-core peaks [FLOP/s] by a part of the name that the driver reports; the first match counts.
_BF16_PEAKS = (
    (r"\bGB200\b", GPUS["gb200"].bf16),
    (r"\bB200\b", GPUS["b200"].bf16),
    (r"\bB100\b", 1750e12),
    (r"\b(GH200|H200)\b", GPUS["h200"].bf16),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\b(H100|H800)\b", GPUS["h100"].bf16),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", GPUS["a100"].bf16),
    (r"\bL40S\b", 362e12),
    (r"\bA10G?\b", 125e12),
    (r"\bMI300X\b", 1307.4e12),
)


def gpu_named(name: str) -> Gpu:
    """A GPU by the name that `--gpu` takes.

    Raises:
        UsageError: no such name.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UsageError(f"--gpu {name}: no figures of it", remedy=f"use one of {', '.join(GPUS)}")
    return found


def bf16_peak(device_name: str) -> float | None:
    """Peak of a device for bf16 matrix products [FLOP/s]; None if it is unknown.

    Args:
        device_name: as its driver reports it, e.g. NVIDIA H100 80GB HBM3.
    """
    if "MIG" in device_name:  # a MIG slice is an unknown part of the device
        return None
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, device_name)), None)
