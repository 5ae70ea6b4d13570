"""Failed ranks by the logs of torchrun's agents."""

from __future__ import annotations

import calendar
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import agent, failures

NOW = 1_790_000_000.0


def line(seconds: float, code: int, local: int) -> str:
    """As torch 2.13 writes it."""
    moment = time.strftime("%m%d %H:%M:%S", time.gmtime(NOW + seconds))
    where = "27182 torch/distributed/elastic/multiprocessing/api.py:1002"
    return f"E{moment}.500000 {where}] failed (exitcode: {code}) local_rank: {local} (pid: 9) of binary: /bin/python\n"


@pytest.mark.parametrize(
    ("logs", "named"),
    [
        ({0: [], 1: []}, []),
        ({1: [(20, -9, 0)]}, ["rank 2 on n2: killed by SIGKILL"]),
        # the other node's ranks lost the connection afterwards; what is older belongs to an earlier round
        (
            {0: [(-60, -11, 0), (21, 1, 1)], 1: [(20, -9, 1)]},
            ["rank 3 on n2: killed by SIGKILL", "rank 1 on n1: exit status 1"],
        ),
        ({0: [(-60, 1, 0)], 1: [(-61, -9, 0)]}, []),
        # noticed late: a killed rank is why the other one lost its connection; much later the agents kill what is left
        (
            {0: [(20, 1, 0)], 1: [(22, -9, 0)]},
            ["rank 2 on n2: killed by SIGKILL", "rank 0 on n1: exit status 1"],
        ),
        (
            {0: [(20, 1, 0)], 1: [(50, -9, 0)]},
            ["rank 0 on n1: exit status 1", "rank 2 on n2: killed by SIGKILL"],
        ),
    ],
)
def test_the_first_of_the_last_round(
    logs: dict[int, list[tuple[float, int, int]]], named: list[str], tmp_path: Path
) -> None:
    for number, lines in logs.items():
        text = "W1128 warning\n" + "".join(line(*one) for one in lines) + "Root Cause (first observed failure):\n"
        (tmp_path / f"agent_{number}.log").write_text(text)
    assert [str(one) for one in failures.of_agents(tmp_path, ["n1", "n2"], tasks=2, since=NOW)] == named
    assert str(agent.first_failed(tmp_path, ["n1", "n2"], tasks=2, since=NOW)) == (named or ["None"])[0]
    (tmp_path / "status_0").write_text("75\n")
    (tmp_path / "status_3").write_text("3\n")  # withheld from the agent: a restart would not change it
    assert str(agent.first_failed(tmp_path, ["n1", "n2"], tasks=2, since=NOW)) == "rank 3 on n2: exit status 3"


@pytest.mark.parametrize(
    "zone", ["America/St_Johns", *(pytest.param(zone, marks=pytest.mark.long) for zone in ("UTC", "Asia/Tokyo"))]
)
def test_an_agent_in_another_time_zone(zone: str, tmp_path: Path) -> None:
    """Of a container, for instance: the agent itself writes the line that is read here."""
    script = (
        "import logging, sys; from launch import agent\n"
        "agent.runpy.run_module = lambda *_, **__: None\n"
        "agent._node([sys.argv[1], 'n1', '1', '1', '1', '0', 'train'], {'SLURM_NODEID': '0'})\n"
        "from torch._logging._internal import TorchLogsFormatter\n"
        "said = logging.LogRecord('torch', logging.ERROR, 'api.py', 1002,"
        " 'failed (exitcode: -9) local_rank: 0 (pid: 9)', (), None)\n"
        "print(TorchLogsFormatter(trace=False).format(said))"
    )
    before = time.time()
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, "TZ": zone}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "agent_0.log").write_text(ended.stdout)
    (found,) = failures.of_agents(tmp_path, ["n1"], tasks=1, since=before)
    assert str(found) == "rank 0 on n1: killed by SIGKILL"
    assert failures.of_agents(tmp_path, ["n1"], tasks=1, since=time.time() + 60) == []  # nor hours later


@pytest.mark.parametrize(
    ("since", "at", "counts"),
    [
        ("2026-12-31 23:59:50", "0101 00:00:20", True),
        ("2026-12-31 23:59:50", "1231 23:59:55", True),
        ("2026-12-31 23:59:50", "1231 23:58:00", False),  # an earlier round, not one of next December
        ("2027-01-01 00:00:05", "1231 23:59:50", False),
        ("2027-03-01 00:00:00", "0229 10:00:00", False),  # a log of another year
        ("2028-02-28 23:00:00", "0229 10:00:00", True),
    ],
)
def test_rounds_around_the_end_of_a_year(since: str, at: str, counts: bool, tmp_path: Path) -> None:
    """The agents write no year; their clocks show UTC."""
    began = calendar.timegm(time.strptime(since, "%Y-%m-%d %H:%M:%S"))
    (tmp_path / "agent_0.log").write_text(re.sub(r"^E.{13}", f"E{at}", line(0, -9, 1)))
    named = [str(one) for one in failures.of_agents(tmp_path, ["n1"], tasks=2, since=began)]
    assert named == (["rank 1 on n1: killed by SIGKILL"] if counts else [])
