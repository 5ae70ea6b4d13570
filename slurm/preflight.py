# Checks of one node before training: `srun --ntasks-per-node=1 python -m slurm.preflight ...`, one JSON object a node.
# Needs no torch and takes a second. launch/job.py acts on the result (requeue without the node, cordon file).
"""Node checks.

A node that would fail an hour into a run, or slow all others down, is cheaper to find before: devices missing or in
use, uncorrectable memory errors, full disks, too little shared memory, a run folder that cannot be written, a clock
that is off. The model is OLMo-core's health check with its cordon file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The checks clock and all_reduce involve several nodes; they are in launch/nodes.py and slurm/bandwidth.py.
CHECKS = (
    *("gpus", "gpu_idle", "gpu_memory_errors", "gpu_xid", "disk", "shared_memory", "run_folder", "python", "clock"),
    "all_reduce",
)
_PYTHON = (3, 11)
# Modules that `mmscale train` requires.
MODULES = ("torch", "megatron", "numpy", "orjson", "psutil", "pydantic", "rich", "typer", "xxhash", "yaml")
MAX_SKEW_S = 30.0  # between nodes; certificates, leases and logs depend on their clocks
_SMI_TIMEOUT_S = 30.0  # with a broken driver nvidia-smi hangs
_BUSY_MIB = 500.0
# Errors of the driver after which a device needs a reset or a technician (NVIDIA, "XID errors"): double-bit ECC, failed
# row remapping, NVLink, fallen off the bus, uncontained ECC, GSP timeout.
_XIDS = frozenset({48, 64, 74, 79, 95, 119, 120})


@dataclass(frozen=True)
class NodeRequirements:
    """The requirements for a node.

    Attributes:
        gpus: number of devices.
        disk_gb: free in the run folder's file system [GB].
        shared_memory_gb: free in /dev/shm [GB].
        run: the run's folder.
    """

    gpus: int = 0
    disk_gb: float = 1.0
    shared_memory_gb: float = 0.1
    run: Path = Path()


def examine(
    wanted: NodeRequirements,
    *,
    skip: Sequence[str] = (),
) -> dict:
    """Run the checks on this node.

    Args:
        wanted: the requirements.
        skip: names of checks that are turned off.

    Returns:
        node, time, problems (check -> what is wrong), measured.
    """
    measured: dict[str, Any] = {}
    problems: dict[str, str] = {}
    checks: dict[str, Callable[[NodeRequirements, dict[str, Any]], str]] = {
        "disk": _disk,
        "shared_memory": _shared_memory,
        "run_folder": _run_folder,
        "python": _python,
    }
    if wanted.gpus:
        checks["gpus"] = _gpus
        checks["gpu_idle"] = lambda wanted, measured: _gpu_idle()
        checks["gpu_memory_errors"] = lambda wanted, measured: _gpu_memory_errors()
        checks["gpu_xid"] = lambda wanted, measured: _gpu_xid(measured, _kernel_log())
    for name, check in checks.items():
        if name in skip:
            continue
        try:
            problem = check(wanted, measured)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            problem = str(error)
        if problem:
            problems[name] = problem
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return {"node": node, "time": time.time(), "problems": problems, "measured": measured}


def _disk(wanted: NodeRequirements, measured: dict[str, Any]) -> str:
    free = shutil.disk_usage(wanted.run).free / 1e9
    measured["disk_gb"] = round(free, 1)
    return f"{free:.1f} GB free in {wanted.run}, wants {wanted.disk_gb:g}" if free < wanted.disk_gb else ""


def _shared_memory(wanted: NodeRequirements, measured: dict[str, Any]) -> str:
    free = shutil.disk_usage("/dev/shm").free / 1e9  # noqa: S108  asked, not written
    measured["shared_memory_gb"] = round(free, 1)
    return (
        f"{free:.2f} GB free in /dev/shm, wants {wanted.shared_memory_gb:g}" if free < wanted.shared_memory_gb else ""
    )


def _run_folder(wanted: NodeRequirements, measured: dict[str, Any]) -> str:
    """Write, read and remove a file: a full quota fails at the write, a read-only mount at the open."""
    file = wanted.run / f".preflight.{socket.gethostname()}.{uuid.uuid4().hex}"
    text = os.urandom(4096)
    began = time.monotonic()
    try:
        file.write_bytes(text)
        same = file.read_bytes() == text
    finally:
        file.unlink(missing_ok=True)
    measured["run_folder_s"] = round(time.monotonic() - began, 4)
    return "" if same else f"{wanted.run} gives back other bytes than were written"


def _python(wanted: NodeRequirements, measured: dict[str, Any]) -> str:
    """Whether this interpreter, possibly in a container, has the modules that a rank imports; nothing is imported."""
    measured["python"] = found = f"{sys.executable} (Python {platform.python_version()})"
    if sys.version_info < _PYTHON:
        return f"{found} is older than {'.'.join(map(str, _PYTHON))}"
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    return f"{found} has no {', '.join(missing)}" if missing else ""


def _nvidia_smi(fields: str) -> list[list[str]]:
    """One list of values per device.

    Raises:
        OSError, subprocess.SubprocessError: there is no driver, or it does not answer.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    if ended.returncode:
        said = (ended.stdout.strip() or ended.stderr.strip()).splitlines()  # empty if it was killed
        raise OSError(f"nvidia-smi: {said[0] if said else f'exit status {ended.returncode}'}")
    return [[value.strip() for value in line.split(",")] for line in ended.stdout.splitlines() if line.strip()]


def _gpus(wanted: NodeRequirements, measured: dict[str, Any]) -> str:
    found = [name for (name,) in _nvidia_smi("name")]
    measured["gpus"] = found
    return f"{len(found)} of {wanted.gpus} GPUs are there" if len(found) < wanted.gpus else ""


def _gpu_idle() -> str:
    busy = [f"GPU {index}: {used} MiB" for index, used in _nvidia_smi("index,memory.used") if float(used) > _BUSY_MIB]
    return f"memory in use before the start: {'; '.join(busy)}" if busy else ""


def _gpu_memory_errors() -> str:
    """Uncorrectable memory errors. Devices without ECC report N/A."""
    rows = _nvidia_smi("index,ecc.errors.uncorrected.volatile.total")
    bad = [f"GPU {index}: {count}" for index, count in rows if count.isdigit() and int(count)]
    return f"uncorrectable memory errors since the last reset: {'; '.join(bad)}" if bad else ""


def _kernel_log() -> str:
    """The kernel's log since this node started; "" if ordinary users may not read it."""
    if shutil.which("dmesg") is None:
        return ""
    ended = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=_SMI_TIMEOUT_S)
    return ended.stdout if ended.returncode == 0 else ""


def _gpu_xid(measured: dict[str, Any], log: str) -> str:
    """Errors in the log that a reset of the driver removes from the device, but that recur under load."""
    found = [(int(code), device) for device, code in re.findall(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)", log)]
    measured["gpu_xids"] = sorted({code for code, _ in found}) if log else "the kernel's log may not be read"
    bad = sorted({f"XID {code} of PCI {device}" for code, device in found if code in _XIDS})
    return f"since this node started: {'; '.join(bad)}" if bad else ""


def clock_problems(answers: Sequence[Mapping[str, Any]], *, within_s: float) -> dict[str, str]:
    """Nodes whose clocks differ from the median by more than the delay of the queries can explain.

    Args:
        answers: of all nodes.
        within_s: time within which all of them were queried [seconds].
    """
    times = sorted(float(answer["time"]) for answer in answers)
    if not times:
        return {}
    median = times[len(times) // 2]
    off = {str(answer["node"]): float(answer["time"]) - median for answer in answers}
    return {node: f"its clock is {skew:+.0f} s off" for node, skew in off.items() if abs(skew) > within_s + MAX_SKEW_S}


def main() -> int:
    """Print this node's answer; always 0: a missing answer identifies a node that cannot answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--disk-gb", type=float, default=1.0)
    parser.add_argument("--shared-memory-gb", type=float, default=0.1)
    parser.add_argument("--skip", action="append", default=[], choices=CHECKS)
    given = parser.parse_args()
    wanted = NodeRequirements(given.gpus, given.disk_gb, given.shared_memory_gb, given.run)
    print(json.dumps(examine(wanted, skip=given.skip)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
