"""Data-sheet figures of GPUs and of the machines around them, and assumptions about what of them is reached.

plan/measured.py reads the figures of a machine that was measured. The MFU of a run uses the peaks of this module too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmscale.errors import UsageError


@dataclass(frozen=True)
class Efficiency:
    """What large operations reach of a device's figures, and what every operation costs besides.

    The defaults are assumptions about GPUs. `mmscale bench calibrate` measures a machine's own.

    Attributes:
        products: share of the peak in matrix products.
        half_width: a product whose shortest side has this many elements reaches half of it.
        attention_te: share of the peak in attention with Transformer-Engine's kernels.
        attention: the same with torch's, whose masked kernel also computes the half that a causal mask hides.
        memory: share of the memory's bandwidth in element-wise operations.
        moves: how often element-wise operations move every byte that a layer keeps, in forward.
        routed_moves: the same for what routing and experts keep.
        backward_moves: a multiple of both, in backward.
        logits: bytes that the loss moves per token and id.
        adam: bytes that the optimizer moves per parameter of its shard.
        launch: seconds to start a kernel; backward starts twice as many as forward (`ModelKind.kernels`).
        fixed: seconds of a step that depend on nothing else.
        link: share of the figure of messages inside a machine.
        network: share of the figure of messages between machines.
        latency: seconds until a message arrives, inside and between machines.
    """

    products: float = 0.7
    half_width: float = 256.0
    attention_te: float = 0.4
    attention: float = 0.2
    memory: float = 0.8
    moves: float = 2.0
    routed_moves: float = 2.0
    backward_moves: float = 1.5
    logits: float = 20.0
    adam: float = 34.0
    launch: float = 4e-6
    fixed: float = 0.0
    link: float = 0.75
    network: float = 0.8
    latency: tuple[float, float] = (5e-6, 15e-6)


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
        efficiency: what of the figures is reached.
        host: whether the device is a CPU, whose kernels and memory are the host's own.
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
    efficiency: Efficiency = Efficiency()
    host: bool = False


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
