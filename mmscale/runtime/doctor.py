"""Checks of this machine for `mmscale doctor`.

`mmscale doctor`: what works on this machine, what is missing, what is wrong, and how to fix it. Each check is
independent and must not raise; nothing is changed, and torch is imported only for its checks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from mmscale.runtime import engine_range

Status = Literal["ok", "warn", "missing"]
ApexStatus = Literal["absent", "wrong", "python-only", "ok"]

MEGATRON = "0.16.1"  # tested by the suite; the CPU adaptor and the model layers depend on its internals
MEGATRON_TRIED = (MEGATRON, "0.17.1", "0.18.2", "0.19.2")  # docs/versions.md
_TORCH = "2.6"
_GIB = 2**30
_LEAST_FREE_GIB = 5
_LEAST_SHM_GIB = 1
_LEAST_FILES = 1024


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: "missing" is only a fault if it is required.
        detail: What was found.
        fix: What to do; "" if nothing.
        required: Whether mmscale cannot train without it.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = False


def examine(*, run_dir: Path = Path("runs")) -> list[dict[str, Any]]:
    """Run all checks.

    Args:
        run_dir: Folder for runs; it need not exist yet.

    Returns:
        One dict per check: name, status ("ok", "warn", "missing"), detail, fix, required.
    """
    torch, torch_check = _torch()
    checks: list[Check] = [_python(), torch_check, _megatron()]
    for check in (_devices, _communication, _transformer_engine):
        checks += _safely(check.__name__.strip("_").replace("_", "-"), partial(check, torch))
    for name, plain in (("apex", _apex), ("slurm", _slurm), ("mpi", _mpi), ("packages", _optional), ("host", _host)):
        checks += _safely(name, plain)
    checks += _safely("folders", partial(_folders, run_dir))
    return [asdict(check) for check in checks]


def healthy(checks: list[dict[str, Any]]) -> bool:
    """Whether no required component is missing."""
    return not any(check["required"] and check["status"] == "missing" for check in checks)


def apex_status() -> ApexStatus:
    """Which `apex` is importable: PyPI's is an unrelated web toolkit, one without kernels misleads megatron-core."""
    try:
        if importlib.util.find_spec("apex") is None:
            return "absent"
        if importlib.util.find_spec("apex.multi_tensor_apply") is None:
            return "wrong"
    except Exception:  # PyPI's apex may raise anything without its own dependencies
        return "wrong"
    built = all(importlib.util.find_spec(name) is not None for name in ("amp_C", "fused_weight_gradient_mlp_cuda"))
    return "ok" if built else "python-only"


def _safely(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """All findings of a check; one that raises is itself a finding."""
    found: list[Check] = []
    try:
        found.extend(check())
    except Exception as error:  # doctor itself must never fail
        found.append(Check(name, "warn", f"could not be checked: {type(error).__name__}: {error}"))
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _older(version: str, least: str) -> bool:
    try:
        return Version(version) < Version(least)
    except InvalidVersion:
        return False


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} in {sys.prefix}", required=True)


def _torch() -> tuple[ModuleType | None, Check]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        fix = "pip install -c constraints.txt -e ."
        return None, Check("torch", "missing", f"cannot be imported: {_first_line(error)}", fix, required=True)
    except Exception as error:  # a CUDA library that does not load raises OSError, or worse
        fix = "reinstall torch: pip install --force-reinstall torch"
        return None, Check("torch", "missing", f"cannot be imported: {_first_line(error)}", fix, required=True)
    version = str(torch.__version__)
    if _older(version, _TORCH):
        return torch, Check("torch", "warn", f"{version}, older than {_TORCH}", f"pip install 'torch>={_TORCH}'")
    return torch, Check("torch", "ok", version, required=True)


def _megatron() -> Check:
    version = _version("megatron-core")
    fix = f"pip install megatron-core=={MEGATRON}"
    if version is None:
        return Check("megatron-core", "missing", "not installed", fix, required=True)
    if version not in MEGATRON_TRIED:
        return Check("megatron-core", "warn", f"{version}, mmscale was tried with {', '.join(MEGATRON_TRIED)}", fix)
    return Check("megatron-core", "ok", version, required=True)


def _devices(torch: ModuleType | None) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    if torch is None:
        return
    from mmscale.runtime import device

    if not device.has_cuda():
        has_driver = shutil.which("nvidia-smi") is not None
        if has_driver and torch.version.cuda is None:
            yield Check(
                "device", "warn", "there is a GPU driver, but this torch is built for CPU", "install torch for CUDA"
            )
        elif has_driver:
            fix = "compare `nvidia-smi`'s CUDA version with torch.version.cuda, and look at CUDA_VISIBLE_DEVICES"
            yield Check("device", "warn", f"torch for CUDA {torch.version.cuda} finds no usable GPU", fix)
        else:
            yield Check(
                "device", "ok", f"no GPU: {device.device_name()}, {cores} cores; fit for tests and the quickstart"
            )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, sm_{properties.major}{properties.minor}"
        if properties.major < 8:
            yield Check(f"device {index}", "warn", f"{detail}: no bf16", "train with precision.dtype=fp32")
        else:
            yield Check(f"device {index}", "ok", detail)
    yield Check("cuda", "ok", f"CUDA {torch.version.cuda}, {cores} cores")


def _communication(torch: ModuleType | None) -> Iterator[Check]:
    if torch is None:
        return
    distributed = torch.distributed
    if not distributed.is_available():
        yield Check(
            "torch.distributed", "missing", "not in this build", "install torch from pytorch.org", required=True
        )
        return
    gloo = distributed.is_gloo_available()
    yield Check("gloo", "ok" if gloo else "missing", "ranks on CPU" if gloo else "no ranks on CPU")
    if distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "built in"
        yield Check("nccl", "ok", version)
    elif torch.cuda.is_available():
        fix = "install a torch build with NCCL"
        yield Check("nccl", "missing", "not in this build of torch", fix, required=torch.cuda.device_count() > 1)
    else:
        yield Check("nccl", "ok", "not in this build of torch, and not needed without GPUs")


def _transformer_engine(torch: ModuleType | None) -> Iterator[Check]:
    name = "transformer-engine"
    version = _version("transformer-engine") or _version("transformer-engine-torch")
    wanted = f"pip install 'transformer-engine[pytorch]{engine_range.WANTED}'"
    gpu = torch is not None and torch.cuda.is_available()
    if version is None:
        detail = "not installed: torch's own layers are used" + ("" if gpu else ", as always without a GPU")
        yield Check(name, "missing" if gpu else "ok", detail, wanted if gpu else "")
        return
    if _older(version, engine_range.FIRST) or not _older(version, engine_range.BELOW):
        yield Check(name, "warn", f"{version} was not tried with mmscale", wanted)
        return
    if not gpu:  # megatron_cpu.py hides it from megatron-core there
        yield Check(name, "ok", f"{version}, unused without a GPU")
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:  # megatron-core works without it
        fix = "install the version that fits this torch's cuBLAS; 2.11.0 for torch 2.11 with CUDA 13: docs/install.md"
        yield Check(name, "warn", f"{version} cannot be imported: {_first_line(error)}", fix)
        return
    except Exception as error:  # no cuDNN: RuntimeError; an undefined symbol of cuBLAS: OSError
        detail = f"{version} fails to import, and megatron-core with it, which catches ImportError only"
        fix = "pip uninstall transformer-engine transformer-engine-torch, or see docs/install.md"
        yield Check(name, "missing", f"{detail}: {_first_line(error)}", fix, required=True)
        return
    yield Check(name, "ok", version)


def _apex() -> Iterator[Check]:
    status = apex_status()
    if status == "absent":
        yield Check("apex", "ok", "not installed: not needed, Transformer-Engine or torch does its work")
    elif status == "ok":
        yield Check("apex", "ok", "NVIDIA apex with its CUDA kernels: gradients are fused in the output layer too")
    elif status == "wrong":
        detail = "the installed `apex` is not NVIDIA's (PyPI's apex is an unrelated web toolkit)"
        yield Check("apex", "warn", detail, "pip uninstall apex")
    else:
        detail = "NVIDIA apex without its CUDA kernels: megatron-core takes it for whole and picks layers that fail"
        fix = "pip uninstall apex, or build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1: docs/install.md"
        yield Check("apex", "warn", detail, fix)


def _slurm() -> Iterator[Check]:
    job = os.environ.get("SLURM_JOB_ID")
    if shutil.which("sbatch") is None:
        where = f"inside job {job}, but without its commands" if job else "no sbatch here"
        yield Check("slurm", "missing", f"{where}: `mmscale launch` needs it, `mmscale train` does not")
        return
    version = _output("sbatch", "--version") or "version unknown"
    partitions = _output("sinfo", "--noheader", "--format=%P")
    if partitions is None:
        yield Check(
            "slurm", "warn", f"{version}, but the controller does not answer", "ask `scontrol ping`, check SLURM_CONF"
        )
        return
    inside = f", inside job {job}" if job else ""
    yield Check("slurm", "ok", f"{version}, partitions {', '.join(partitions.split())}{inside}")


def _mpi() -> Iterator[Check]:
    launcher = next((name for name in ("mpirun", "mpiexec") if shutil.which(name)), None)
    python = _version("mpi4py")
    if launcher and python:
        yield Check("mpi", "ok", f"{launcher}, mpi4py {python}")
    elif launcher or python:
        absent = "mpi4py is" if launcher else "mpirun is"
        yield Check(
            "mpi", "warn", f"{absent} not installed, so mpirun cannot start ranks", "pip install 'mmscale[mpi]'"
        )
    else:
        yield Check("mpi", "missing", "only needed to start ranks with mpirun", "pip install 'mmscale[mpi]'")


def _optional() -> Iterator[Check]:
    """Packages of extras."""
    for package, extra, purpose in (
        ("transformers", "hf", "Hugging Face export and VQ image tokenizers"),
        ("pyarrow", "data", "parquet documents"),
        ("wandb", "wandb", "Weights & Biases"),
    ):
        version = _version(package)
        if version is None:
            yield Check(package, "missing", f"only needed for {purpose}", f"pip install 'mmscale[{extra}]'")
        else:
            yield Check(package, "ok", version)


def _host() -> Iterator[Check]:
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
        yield Check("host name", "ok", f"{name} is {address}")
    except OSError:
        fix = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to the interface of the network"
        yield Check("host name", "warn", f"{name} has no address, so other ranks may not find it", fix)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _LEAST_FILES:
        yield Check("open files", "warn", f"at most {files}", f"ulimit -n {4 * _LEAST_FILES}")
    shared = Path("/dev/shm")  # noqa: S108 - asked for its size
    if shared.is_dir() and shutil.disk_usage(shared).free < _LEAST_SHM_GIB * _GIB:
        free = shutil.disk_usage(shared).free / _GIB
        fix = "give the container more (docker run --shm-size=8g), or set data.workers=0"
        yield Check("shared memory", "warn", f"{free:.1f} GiB free in /dev/shm: NCCL and loader processes use it", fix)


def _folders(run_dir: Path) -> Iterator[Check]:
    for name, folder, required in (("runs", run_dir, True), ("temporary", Path(tempfile.gettempdir()), False)):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        fix = f"choose another folder{': run.dir=...' if name == 'runs' else ' with TMPDIR'}"
        problem = _write_problem(existing)
        free = shutil.disk_usage(existing).free / _GIB
        if problem:
            yield Check(f"folder {name}", "missing", f"{folder} cannot be written: {problem}", fix, required)
        elif free < _LEAST_FREE_GIB:
            yield Check(f"folder {name}", "warn", f"{folder} has only {free:.1f} GiB free", fix)
        else:
            yield Check(f"folder {name}", "ok", f"{folder} can be written, {free:.0f} GiB free")


def _write_problem(folder: Path) -> str:
    """Why no file can be created in a folder, or "". Tries it, because root may write where the mode bits forbid it."""
    if not folder.is_dir():
        return f"{folder} is a file"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mmscale-doctor-"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
