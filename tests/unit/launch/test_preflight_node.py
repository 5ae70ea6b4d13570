"""Checks of a node: each of them finds what it is for, and can be turned off."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from launch import cordon
from launch.nodes import _main_error, slow_nodes
from launch.profile import Check
from slurm import bandwidth, preflight
from slurm.bandwidth import pairs
from slurm.preflight import CHECKS, MAX_SKEW_S, NodeRequirements, clock_problems, examine
from tests.support import run_ranks

ROOT = Path(__file__).parents[3]
AWAY = "Unable to contact slurm controller (connect failure)"
HEALTHY = {"name": [["H100"]] * 2, "memory.used": [["0", "3"], ["1", "3"]], "ecc": [["0", "0"], ["1", "[N/A]"]]}


def smi(**changes: list[list[str]]) -> Callable[[str], list[list[str]]]:
    """nvidia-smi's answers to the three questions that are asked."""
    answers = HEALTHY | {key.replace("_used", ".used"): rows for key, rows in changes.items()}
    return lambda fields: next(rows for key, rows in answers.items() if key in fields)


def examine_gpus(run: Path, *, skip: tuple[str, ...] = (), log: str = "", **changes: list[list[str]]) -> dict[str, Any]:
    """Checks of a node with two GPUs, without nvidia-smi and dmesg."""
    wanted = NodeRequirements(gpus=2, disk_gb=0, shared_memory_gb=0, run=run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_nvidia_smi", smi(**changes))
        patch.setattr(preflight, "_kernel_log", lambda: log)
        return examine(wanted, skip=skip)


def problems(run: Path, *, skip: tuple[str, ...] = (), **changes: list[list[str]]) -> dict[str, str]:
    return examine_gpus(run, skip=skip, **changes)["problems"]


def test_a_healthy_node_has_none(tmp_path: Path) -> None:
    assert problems(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("check", "changes", "said"),
    [
        ("gpus", {"name": [["H100"]]}, "1 of 2 GPUs are there"),
        ("gpu_idle", {"memory_used": [["0", "3"], ["1", "70000"]]}, "GPU 1: 70000 MiB"),
        ("gpu_memory_errors", {"ecc": [["0", "4"], ["1", "0"]]}, "GPU 0: 4"),
    ],
)
def test_devices(tmp_path: Path, check: str, changes: dict[str, list[list[str]]], said: str) -> None:
    found = problems(tmp_path, **changes)
    assert list(found) == [check] and said in found[check]
    assert problems(tmp_path, skip=(check,), **changes) == {}


def test_errors_of_the_driver_that_only_a_reset_mends(tmp_path: Path) -> None:
    said = (
        "[  12.3] NVRM: Xid (PCI:0000:3b:00): 13, pid=411, Graphics Exception\n"  # a program's own fault
        "[9912.3] NVRM: Xid (PCI:0000:5e:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
    )
    found = examine_gpus(tmp_path, log=said)
    assert found["problems"] == {"gpu_xid": "since this node started: XID 79 of PCI 0000:5e:00"}
    assert found["measured"]["gpu_xids"] == [13, 79]
    assert examine_gpus(tmp_path, log=said, skip=("gpu_xid",))["problems"] == {}


def test_space_and_the_run_folder(tmp_path: Path) -> None:
    found = examine(NodeRequirements(disk_gb=1e9, shared_memory_gb=1e9, run=tmp_path))["problems"]
    assert set(found) == {"disk", "shared_memory"} and "wants 1e+09" in found["disk"]
    gone = examine(NodeRequirements(disk_gb=0, shared_memory_gb=0, run=tmp_path / "gone"), skip=("disk",))["problems"]
    assert list(gone) == ["run_folder"] and "No such file" in gone["run_folder"]


def test_without_a_driver_the_devices_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examine(NodeRequirements(gpus=1, disk_gb=0, shared_memory_gb=0, run=tmp_path))["problems"]
    assert "nvidia-smi" in found["gpus"]


def test_a_driver_that_dies_without_a_word_is_a_problem_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/bash\nulimit -c 0\nkill -SEGV $$\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examine(NodeRequirements(gpus=1, disk_gb=0, shared_memory_gb=0, run=tmp_path))["problems"]
    assert found == dict.fromkeys(("gpus", "gpu_idle", "gpu_memory_errors"), "nvidia-smi: exit status -11")


def test_clocks_are_compared_between_nodes() -> None:
    answers = [{"node": f"n{number}", "time": 1000.0 + number} for number in range(4)]
    assert clock_problems(answers, within_s=4) == {}
    answers.append({"node": "late", "time": 1000.0 - MAX_SKEW_S - 10})
    assert list(clock_problems(answers, within_s=4)) == ["late"]
    assert "off" in clock_problems(answers, within_s=4)["late"]
    assert clock_problems([], within_s=1) == {}


FOUR = ("n1", "n2", "n3", "n4")


def lines(*, inside: dict[str, float], between: dict[str, float], whole: float | None = 1.0) -> list[dict[str, Any]]:
    """What slurm/bandwidth.py prints."""
    found: list[dict[str, Any]] = [{"node": node, "inside": speed} for node, speed in inside.items()]
    found += [{"pair": pair.split("-"), "between": speed} for pair, speed in between.items()]
    return found + ([{"ranks": 8, "all": whole}] if whole is not None else [])


def slow(printed: list[dict[str, Any]], *, nodes: tuple[str, ...] = FOUR, error: str = "") -> dict[str, str]:
    return slow_nodes(printed, nodes=nodes, inside_gb_s=100, between_gb_s=20, error=error)


def test_a_slow_node_is_told_from_its_healthy_neighbours() -> None:
    inside = dict.fromkeys(FOUR, 300.0)
    fast = {"n1-n2": 40.0, "n3-n4": 41.0, "n2-n3": 39.0, "n4-n1": 40.0}
    assert slow(lines(inside=inside, between=fast)) == {}
    found = slow(lines(inside=inside, between=fast | {"n2-n3": 3.0, "n3-n4": 4.0}))
    assert list(found) == ["n3"] and "4.00 GB/s with its neighbours, wants 20" in found["n3"]
    found = slow(lines(inside=inside | {"n2": 12.0}, between=fast))
    assert list(found) == ["n2"] and "12.00 GB/s between its ranks, wants 100" in found["n2"]


def test_all_reduces_that_do_not_end_name_whom_the_others_wait_for() -> None:
    inside = dict.fromkeys(FOUR, 300.0)
    late = "nothing within 180 s"
    assert list(slow(lines(inside={**inside, "n1": 9.0}, between={}, whole=None), error=late)) == list(FOUR)
    three = {node: speed for node, speed in inside.items() if node != "n3"}
    assert "nothing from its ranks" in slow(lines(inside=three, between={}, whole=None), error=late)["n3"]
    found = slow(lines(inside=inside, between={"n1-n2": 40.0}, whole=None), error=late)
    assert list(found) == ["n3", "n4"] and late in found["n4"]
    assert list(slow(lines(inside=inside, between={"n1-n2": 40, "n3-n4": 40}, whole=None), error=late)) == list(FOUR)
    assert slow([{"node": "n1", "inside": 200.0}], nodes=("n1",)) == {}


def test_every_node_has_two_neighbours() -> None:
    assert pairs(1) == [] and pairs(2) == [(0, 1)] and pairs(3) == [(0, 1), (1, 2)]
    for nodes in (4, 6, 9, 64):
        met = [node for pair in pairs(nodes) for node in pair]
        assert len(set(pairs(nodes))) == len(pairs(nodes)) and set(met) == set(range(nodes))
        assert min(met.count(node) for node in range(1, nodes - 1)) == 2


@pytest.mark.long
def test_bandwidth_is_measured_by_real_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "slurm.bandwidth", "--mb", "4"]
    variables = {"SLURMD_NODENAME": "n7", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    (inside,) = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert inside["node"] == "n7" and 0.001 < inside["inside"] < 100  # [GB/s] through one core's loopback


def test_pairs_without_a_node_in_common_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Four nodes of one rank each; n1 is not ready for its first pair before the pair of n3 and n4 is measured."""
    file = tmp_path / "lines"

    def pair(*nodes: str) -> bool:
        told = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return any(line.get("pair") == list(nodes) for line in told)

    def measured_by(ranks: Any) -> None:
        measure, waited = bandwidth.measure, []
        import torch.distributed as dist

        def late(group: Any, **more: Any) -> float:
            deadline = time.monotonic() + 60
            while ranks.rank == 0 and not waited and not pair("n3", "n4"):
                assert time.monotonic() < deadline, "n3 and n4 wait for n1"
                time.sleep(0.01)
            waited.append(True)
            return measure(group, **more)

        def emit(**fields: Any) -> None:
            with file.open("a") as opened:
                opened.write(json.dumps(fields) + "\n")

        bandwidth.measure, bandwidth._emit = late, emit  # type: ignore[assignment]
        os.environ["SLURMD_NODENAME"] = f"n{ranks.rank + 1}"
        dist.init_process_group("gloo", init_method=ranks.init_method, rank=ranks.rank, world_size=4)
        bandwidth.run(dataclasses.replace(ranks, local_rank=0, local_world_size=1), megabytes=0.1)
        dist.destroy_process_group()

    run_ranks(measured_by, world_size=4, timeout_s=300)
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["node"] for line in told if "node" in line) == list(FOUR)
    found = ["-".join(line["pair"]) for line in told if "pair" in line]
    assert sorted(found) == ["n1-n2", "n2-n3", "n3-n4", "n4-n1"]
    assert all(line["between"] > 0 for line in told if "pair" in line) and told[-1]["all"] > 0


def test_the_command_prints_one_object_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['preflight', *sys.argv[1:]]\n"
        "try: runpy.run_module('slurm.preflight', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "--skip", "disk", "--disk-gb", "1e9"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["problems"] == {}


def test_every_check_can_be_named_in_a_profile() -> None:
    assert get_args(Check) == CHECKS


def test_the_cordon_file_takes_a_node_once_and_one_line_each(tmp_path: Path) -> None:
    file = tmp_path / "shared" / "cordoned.txt"
    assert cordon.add(file, ["n1", "n2"], reason="disk: 0 GB\nfree # really") == ["n1", "n2"]
    assert cordon.add(file, ["n2", "n3", "x;y"], reason="clock") == ["n3"]
    lines = file.read_text().splitlines()
    assert [line.split("  # ")[0] for line in lines] == ["n1", "n2", "n3"]
    assert "disk: 0 GB free really, " in lines[0]
    assert cordon.read(file) == ["n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("a\nsrun: error: n1: task 0: Exited with exit code 1", "a"),
        (
            "slurmstepd: error: pyxis: container start failed with error code: 1\n"
            "slurmstepd: error: pyxis: printing enroot log file:\n"
            "slurmstepd: error: pyxis:     [ERROR] No such file or directory: /i.sqsh\n"
            "slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1\n"
            "srun: error: n1: task 0: Exited with exit code 1\nsrun: Terminating StepId=1.0",
            "slurmstepd: error: pyxis:     [ERROR] No such file or directory: /i.sqsh",
        ),
        (
            "FATAL:   could not open image\nsrun: error: n1: tasks 0-1: Exited with exit code 255",
            "FATAL:   could not open image",
        ),
        (
            "srun: error: Unable to contact slurm controller (connect failure)\nsrun: guess",
            "srun: error: Unable to contact slurm controller (connect failure)",
        ),
        ("srun: error: n1: task 0: Killed", "srun: error: n1: task 0: Killed"),
    ],
)
def test_the_line_that_says_why_a_step_failed(said: str, wanted: str) -> None:
    assert _main_error(said) == wanted


def test_a_python_that_lacks_what_ranks_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = NodeRequirements(run=tmp_path)
    assert "python" not in examine(wanted)["problems"]
    monkeypatch.setattr(preflight, "MODULES", ("json", "no_such_module"))
    assert examine(wanted)["problems"]["python"].endswith(" has no no_such_module")
    monkeypatch.setattr(preflight, "_PYTHON", (99, 1))
    assert "is older than 99.1" in examine(wanted)["problems"]["python"]
