"""The local cluster itself, used by hand as its documentation says: up, its nodes, down, nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.local import node_networks
from slurm.local.cluster import Cluster, ClusterError, missing_programs
from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"no {', '.join(missing_programs())} on this machine")


def by_hand(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "slurm/local/cluster.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def shell(lines: str, command: str) -> str:
    ended = subprocess.run(["bash", "-c", f"{lines}\n{command}"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that this cluster started, by a variable that they all inherit."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"SLURM_CONF={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def interfaces() -> set[str]:
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.long
def test_up_by_hand_a_job_and_down_without_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    up = by_hand("up", "--nodes", "2", "--dir", str(folder), "--print-env")
    try:
        assert up.returncode == 0, up.stderr
        assert all(re.fullmatch(r"export [A-Z_]+=\S+", line) for line in up.stdout.splitlines())
        assert folder.stat().st_mode & 0o077 == 0
        assert sorted(shell(up.stdout, "sinfo -h -N -p main -o '%N %T'").splitlines()) == ["n1 idle", "n2 idle"]
        named = set(shell(up.stdout, "srun -N2 hostname").split())
        cluster = Cluster(folder)
        assert named == ({"n1", "n2"} if cluster.own_names else {socket.gethostname()})
        if cluster.own_names:
            assert "127.0.0.12" in shell(up.stdout, "srun -N1 -w n1 getent hosts n2")
        second = by_hand("up", "--nodes", "2", "--dir", str(folder))
        assert second.returncode == 1 and "runs in" in second.stderr and "already" in second.stderr
        # It goes down with a job in it that would not end by itself.
        shell(up.stdout, 'sbatch -N2 -o /dev/null --wrap \'trap "" TERM; srun bash -c "trap : TERM; sleep 1000"\'')
        until(lambda: any("sleep 1000" in line for line in processes_of(folder)), "the job runs")
    finally:
        down = by_hand("down", "--dir", str(folder))
    assert down.returncode == 0, down.stderr
    assert not folder.exists()
    until(lambda: processes_of(folder) == [], f"left behind: {processes_of(folder)}")
    assert by_hand("down", "--dir", str(folder)).returncode == 0  # nothing is there, and nothing happens


@pytest.mark.long
def test_a_killed_keeper_takes_its_daemons_along(tmp_path: Path) -> None:
    cluster = Cluster.up(tmp_path / "cluster", nodes=1)
    try:
        keeper = cluster.keeper()
        assert keeper is not None
        os.kill(keeper, signal.SIGKILL)
        until(lambda: processes_of(cluster.folder) == [], "daemons end with their keeper")
        assert cluster.keeper() is None
    finally:
        cluster.down()
    assert not cluster.folder.exists()


@pytest.mark.long
@pytest.mark.skipif(not node_networks.possible(), reason="no network namespaces (not root)")
def test_a_node_is_cut_off_and_no_interface_is_left(tmp_path: Path) -> None:
    cluster = Cluster.up(tmp_path / "cluster", nodes=2, networks=True)
    try:
        ports = re.search(r"Port=\[(\d+)-(\d+)\]", (cluster.folder / "etc" / "slurm.conf").read_text())
        assert ports is not None
        # Does the slurmd of n2 answer on n1?
        asked = ["srun", "-N1", "-w", "n1", "timeout", "3", "bash", "-c", f"exec 3<>/dev/tcp/n2/{ports[2]}"]
        cluster.run(*asked)
        network = json.loads((cluster.folder / "cluster.json").read_text())["network"]
        mine = {network["bridge"], *network["links"].values()}
        assert len(mine) == 3 and mine <= interfaces()
        cluster.cut("n2")
        with pytest.raises(ClusterError):
            cluster.run(*asked)
        assert cluster.slurmd("n2") and Path(f"/proc/{cluster.slurmd('n2')}").exists()  # it knows nothing of it
    finally:
        cluster.down()
    assert not mine & interfaces()


@pytest.mark.skipif(not node_networks.possible(), reason="no network namespaces (not root)")
def test_a_keeper_that_cannot_begin_leaves_no_bridge(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()  # of another cluster
    before = interfaces()
    serve = by_hand("serve", "--dir", str(tmp_path), "--nodes", "1", "--networks")
    assert serve.returncode == 1 and "File exists" in serve.stderr
    assert interfaces() <= before
    assert [entry.name for entry in tmp_path.iterdir()] == ["etc"]


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ClusterError, match="is not empty"):
        Cluster.up(tmp_path, nodes=1)
    assert by_hand("env", "--dir", str(tmp_path)).returncode == 1
    Cluster(tmp_path).down()
    assert (tmp_path / "mine").exists()


def test_a_killed_daemon_is_started_again(cluster: Cluster) -> None:
    before = cluster.slurmd("n3")
    os.kill(before, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{before}").exists(), "slurmd ends")
    cluster.restore()
    assert cluster.slurmd("n3") != before
    assert cluster.run("srun", "-N1", "-w", "n3", "echo", "back").strip() == "back"
