# The doctor finds what is wrong with a machine that we make wrong; what this machine has is not tested.
"""Tests of mmscale.runtime.doctor."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmscale.runtime import doctor


def by_name(checks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in checks}


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = doctor._version
    names = {name.replace("_", "-"): version for name, version in changed.items()}
    monkeypatch.setattr(doctor, "_version", lambda package: names[package] if package in names else real(package))


def found(checks: Iterator[doctor.Check]) -> doctor.Check:
    (check,) = checks
    return check


def test_this_machine_is_examined(tmp_path: Path) -> None:
    checks = by_name(doctor.examine(run_dir=tmp_path / "runs"))
    assert {"python", "torch", "megatron-core", "apex", "slurm", "mpi", "gloo", "folder runs"} <= checks.keys()
    assert {check["status"] for check in checks.values()} <= {"ok", "warn", "missing"}
    assert doctor.healthy(list(checks.values()))
    assert list(tmp_path.iterdir()) == []  # only looked at


def test_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = doctor.examine(run_dir=tmp_path)
    assert by_name(checks)["torch"]["status"] == "missing"
    assert "pip install" in by_name(checks)["torch"]["fix"]
    assert not doctor.healthy(checks)


def test_torch_with_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    torch, check = doctor._torch()
    assert torch is None
    assert check.detail == "cannot be imported: libcudart.so.13: cannot open shared object file"


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.16.1", "ok"), ("0.19.2", "ok"), ("0.17.0", "warn"), ("0.20.0", "warn"), (None, "missing")],
)
def test_megatron(monkeypatch: pytest.MonkeyPatch, version: str | None, status: str) -> None:
    versions(monkeypatch, megatron_core=version)
    check = doctor._megatron()
    assert check.status == status
    assert (check.fix == "pip install megatron-core==0.16.1") == (status != "ok")


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fall_ill() -> Iterator[doctor.Check]:
        raise RuntimeError("oops")

    monkeypatch.setattr(doctor, "_slurm", fall_ill)
    assert by_name(doctor.examine(run_dir=tmp_path))["slurm"]["detail"] == "could not be checked: RuntimeError: oops"


# --- apex: the real one, one without kernels, and PyPI's unrelated package -----------------------------------------


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ((), "absent"),
        (("apex/__init__.py",), "wrong"),
        (("apex/__init__.py:import pyramid_that_is_not_there",), "wrong"),
        (("apex/__init__.py", "apex/multi_tensor_apply.py"), "python-only"),
        (("apex/__init__.py", "apex/multi_tensor_apply.py", "amp_C.py", "fused_weight_gradient_mlp_cuda.py"), "ok"),
    ],
)
def test_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: tuple[str, ...], status: str) -> None:
    for entry in files:
        name, _, content = entry.partition(":")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert doctor.apex_status() == status
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    check = found(doctor._apex())
    assert check.status == ("ok" if status in ("absent", "ok") else "warn")
    assert ("pip uninstall apex" in check.fix) == (check.status == "warn")


# --- devices --------------------------------------------------------------------------------------------------------


def gpu(*, available: bool = True, cuda: str | None = "13.0", major: int = 9) -> Any:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=major, minor=0)
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: 2,
            get_device_properties=lambda _index: properties,
            nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
        ),
        version=SimpleNamespace(cuda=cuda),
        distributed=SimpleNamespace(
            is_available=lambda: True, is_gloo_available=lambda: True, is_nccl_available=lambda: cuda is not None
        ),
    )


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmscale.runtime.device.has_cuda", lambda: True)
    first, second, cuda = doctor._devices(gpu())
    assert (first.status, first.detail) == ("ok", "NVIDIA H100, 80 GiB, sm_90")
    assert (second.name, cuda.detail.split(",")[0]) == ("device 1", "CUDA 13.0")
    old = next(doctor._devices(gpu(major=7)))
    assert (old.status, old.fix) == ("warn", "train with precision.dtype=fp32")
    assert [check.detail for check in doctor._communication(gpu())] == ["ranks on CPU", "2.28.9"]
    assert [check.required for check in doctor._communication(gpu(cuda=None))] == [False, True]


@pytest.mark.parametrize(("cuda", "words"), [(None, "built for CPU"), ("13.0", "finds no usable GPU")])
def test_driver_that_torch_does_not_use(monkeypatch: pytest.MonkeyPatch, cuda: str | None, words: str) -> None:
    monkeypatch.setattr("mmscale.runtime.device.has_cuda", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = found(doctor._devices(gpu(available=False, cuda=cuda)))
    assert check.status == "warn"
    assert words in check.detail


@pytest.mark.parametrize(
    ("version", "on_gpu", "status"),
    [
        (None, False, "ok"),
        (None, True, "missing"),
        ("2.11.0", False, "ok"),
        ("2.20.2", False, "ok"),
        ("2.21.0", False, "warn"),
        ("2.8.0", True, "warn"),
        ("1.13", True, "warn"),
    ],
)
def test_transformer_engine(monkeypatch: pytest.MonkeyPatch, version: str | None, on_gpu: bool, status: str) -> None:
    versions(monkeypatch, transformer_engine=version, transformer_engine_torch=None)
    assert found(doctor._transformer_engine(gpu(available=on_gpu))).status == status


def test_transformer_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, transformer_engine="2.11.0")
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    check = found(doctor._transformer_engine(gpu()))
    assert check.status == "warn"
    assert "cannot be imported" in check.detail


def test_transformer_engine_that_takes_megatron_core_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine.py").write_text("raise RuntimeError('cudnn shared object not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    versions(monkeypatch, transformer_engine="2.11.0")
    check = found(doctor._transformer_engine(gpu()))
    assert (check.status, check.required) == ("missing", True)
    assert "cudnn shared object not found" in check.detail and "pip uninstall" in check.fix


# --- schedulers, host, folders --------------------------------------------------------------------------------------


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    assert found(doctor._slurm()).status == "missing"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_output", lambda *command: "slurm 24.05" if command[0] == "sbatch" else "gpu*\ncpu")
    assert found(doctor._slurm()).detail == "slurm 24.05, partitions gpu*, cpu, inside job 7"
    monkeypatch.setattr(doctor, "_output", lambda *_command: None)
    assert "does not answer" in found(doctor._slurm()).detail


@pytest.mark.parametrize(
    ("launcher", "package", "status"),
    [("mpirun", "4.1", "ok"), ("mpirun", None, "warn"), (None, "4.1", "warn"), (None, None, "missing")],
)
def test_mpi(monkeypatch: pytest.MonkeyPatch, launcher: str | None, package: str | None, status: str) -> None:
    versions(monkeypatch, mpi4py=package)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == launcher else None)
    assert found(doctor._mpi()).status == status


def test_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(doctor.socket, "getaddrinfo", unknown)
    check = next(doctor._host())
    assert check.status == "warn"
    assert "GLOO_SOCKET_IFNAME" in check.fix


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checks = [doctor.asdict(check) for check in doctor._folders(tmp_path / "file" / "runs")]
    assert checks[0]["status"] == "missing"
    assert "is a file" in checks[0]["detail"]
    assert not doctor.healthy(checks)


def test_folder_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=2**30))
    check = next(doctor._folders(tmp_path))
    assert (check.status, check.detail) == ("warn", f"{tmp_path} has only 1.0 GiB free")
