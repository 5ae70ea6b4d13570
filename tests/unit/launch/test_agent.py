"""Ranks below torchrun: their numbers, what their agent is told, and attempts that an agent began."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import agent
from mmscale.errors import UsageError
from mmscale.resilience import lease, run_lock
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EventLog, read_events
from mmscale.runtime.rank_env import unused_port

ROOT = Path(__file__).parents[3]


def rank(logs: Path, *train: str, node: int = 1, local: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.agent", "rank", str(logs), "n1", *train]
    # torchrun has numbered the nodes another way round.
    variables = {"SLURM_NODEID": str(node), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def test_ranks_are_numbered_as_slurm_numbers_nodes_and_write_logs_of_their_own(tmp_path: Path) -> None:
    for local in (0, 1):
        ended = rank(tmp_path, "--version", local=local)
        assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank_2.log", "rank_3.log"]
    assert agent.statuses(tmp_path) == {} and agent.true_status(tmp_path, 137) == 137


def test_what_trying_again_would_not_change_is_no_crash_for_the_agent(tmp_path: Path) -> None:
    ended = rank(tmp_path, "train", str(tmp_path / "absent.yaml"))
    assert ended.returncode == 0
    assert agent.statuses(tmp_path) == {3: 2}
    assert "absent.yaml" in (tmp_path / "rank_3.log").read_text()
    (tmp_path / "status_0").write_text("75\n")
    (tmp_path / "status_1").touch()  # being written
    assert agent.statuses(tmp_path) == {0: 75, 3: 2}
    assert agent.true_status(tmp_path, 0) == 2  # what a person has to mend before a stop


def test_a_round_is_not_decided_by_the_one_before(tmp_path: Path) -> None:
    """A rank that stopped on request while another one died: agents start both again, and both reach the last step."""
    (tmp_path / "status_3").write_text("75\n")
    (tmp_path / "status_2").write_text("3\n")  # of another rank, which has not started again yet
    assert rank(tmp_path, "--version").returncode == 0
    assert agent.statuses(tmp_path) == {2: 3} and agent.true_status(tmp_path, 0) == 3
    assert rank(tmp_path, "--version", local=0).returncode == 0
    assert agent.statuses(tmp_path) == {} and agent.true_status(tmp_path, 0) == 0
    # The attempt that rank 0 begins still names what decided the last round, and nothing older.
    named = {"tasks": 2, "restarted": True}
    assert str(agent.first_failed(tmp_path, ["n1", "n2"], since=0.0, **named)) == "rank 2 on n2: exit status 3"
    assert agent.first_failed(tmp_path, ["n1", "n2"], since=time.time() + 60, **named) is None
    assert rank(tmp_path, "--version", local=0).returncode == 0
    assert agent.first_failed(tmp_path, ["n1", "n2"], since=0.0, **named) is None


def test_a_start_in_place_is_an_attempt_of_its_own_under_the_same_lease(tmp_path: Path) -> None:
    environ = {lease.VARIABLE: "7.0.0", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    run_lock.acquire(tmp_path, "7.0.0", attempt=4, job="7")
    EventLog(tmp_path, 4).add("launch", attempt_id="7.0.0")
    agent.begin_attempt(tmp_path, tmp_path, environ)
    assert len(read_events(tmp_path)) == 1  # the first start is the job's
    (tmp_path / "config.4.yaml").touch()  # ranks of this attempt have begun
    agent.begin_attempt(tmp_path, tmp_path, environ)
    _, ended, begun = read_events(tmp_path)
    assert (ended["attempt"], ended["event"], ended["action"]) == (4, "ranks_ended", agent.IN_PLACE)
    assert (begun["attempt"], begun["event"], begun["attempt_id"]) == (5, "launch", "7.0.0")
    assert lease.launched_attempt(tmp_path, environ) == 5 and next_attempt(tmp_path) == 6
    found = lease.owner(tmp_path)
    assert found is not None and (found.id, found.job) == ("7.0.0", "7")

    (tmp_path / "config.5.yaml").touch()
    run_lock.acquire(tmp_path, "7.1.0", attempt=6, job="7")
    agent.begin_attempt(tmp_path, tmp_path, environ)  # not ours any more: the fence ends this rank
    assert len(read_events(tmp_path)) == 3
    with pytest.raises(lease.FencedError, match=r"belongs to attempt 7\.1\.0"):
        lease.renew(tmp_path, "7.0.0", attempt=9)
    assert json.loads((tmp_path / lease.LEASE).read_text())["attempt"] == 6


def test_signals_of_slurm_are_the_ranks_business_and_wait_for_them(tmp_path: Path) -> None:
    """torchrun neither ends for SIGTERM nor hears of it; what comes before a rank listens is not lost.

    And it leaves no folder behind.
    """
    (tmp_path / "node").mkdir()
    (tmp_path / "logs").mkdir()
    numbers = ["localhost", str(unused_port()), "1", "1", "0"]
    command = [sys.executable, "-m", "launch.agent", "node", str(tmp_path / "logs"), *numbers, "train", "absent.yaml"]
    variables = os.environ | {"SLURM_NODEID": "0", "TMPDIR": str(tmp_path / "node")}
    agent_process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    ours = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    try:
        deadline = time.monotonic() + 120
        while not all(_blocks(agent_process.pid, number) for number in ours):
            assert agent_process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for number in ours:
            agent_process.send_signal(number)
        _, said = agent_process.communicate(timeout=300)
        assert agent_process.returncode == 0, said
        assert agent.statuses(tmp_path / "logs") == {0: 2}  # the rank ended by itself: there is no such configuration
        assert list((tmp_path / "node").iterdir()) == []
    finally:
        agent_process.kill()
        agent_process.wait()


def _blocks(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


def test_it_is_not_for_people() -> None:
    for arguments in ([], ["rank"], ["node", "logs"]):
        with pytest.raises(UsageError, match="ranks: torchrun"):
            agent.main(arguments)
