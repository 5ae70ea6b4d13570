"""What SLURM takes its time for: nodes that die, half or whole, one that is cut off, and a time limit.

Four runs go through it at once, on one cluster of their own: SLURM takes half a minute to notice a dead node, and knows
time limits in minutes. It goes on elsewhere, and who has lost the run writes nothing.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import scheduler, submit
from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import METRICS
from mmscale.runtime.rank_env import expand_hostlist
from slurm.local import node_networks
from slurm.local.cluster import Cluster, missing_programs
from tests.slurm.jobs import DEADLINE_S, POLL_S, PROFILE, Jobs, Run, assert_equal, steps_done_again

pytestmark = pytest.mark.long
NODES = 10


@dataclass
class Loss:
    """A run and the node that it loses.

    Attributes:
        run: the run.
        step: the fault comes once this one is logged.
        which: of its nodes.
        fault: what happens to that node.
        node: it, when it has happened.
        rank: process id of rank 0 before the fault.
    """

    run: Run
    step: int
    which: int
    fault: Callable[[Cluster, str], None]
    node: str = ""
    rank: int = 0


def _kill_slurmd(cluster: Cluster, node: str) -> None:
    os.kill(cluster.slurmd(node), signal.SIGKILL)


@dataclass(frozen=True)
class Story:
    """What was seen."""

    jobs: Jobs
    limited: Run
    half_dead: Loss
    dead: Loss | None
    cut_off: Loss | None


@pytest.fixture(scope="module")
def story(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if lacking := missing_programs():
        pytest.skip(f"no {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge")
    folder = tmp_path_factory.mktemp("lost")
    networks = node_networks.possible()
    cluster = Cluster.up(folder / "cluster", nodes=NODES, networks=networks)
    before = dict(os.environ)
    os.environ.update(cluster.environment())
    jobs = Jobs(cluster, config, _profile(folder, networks=networks), folder)
    try:
        short = _profile(folder, networks=networks, time="2m", signal_delay="60s")
        limited = dataclasses.replace(jobs, profile=short, runs=jobs.runs).launch("run.name=limited", slow_s=1.0)
        endless = ("train.steps=4000", "checkpoint.every=20")
        half_dead = Loss(jobs.launch("run.name=half_dead", *endless, nodes=1, slow_s=0.1), 5, 0, _kill_slurmd)
        dead = cut_off = None
        if networks:  # whose a process is can be told, and a network can be cut
            dead = Loss(jobs.launch("run.name=dead", slow_s=0.1), 13, 1, Cluster.kill)
            # The first node: the process that watches the ranks is there, and goes on without SLURM.
            cut_off = Loss(jobs.launch("run.name=cut_off", slow_s=0.1), 13, 0, lambda cluster, node: cluster.cut(node))
        losses = [loss for loss in (half_dead, dead, cut_off) if loss is not None]
        runs = [limited, *(loss.run for loss in losses)]
        _until(runs, lambda: _all_hit(cluster, losses), "all lose a node")
        ended = [limited, *(loss.run for loss in losses[1:])]
        _until(
            runs,
            lambda: half_dead.run.attempt() >= 2 and all(run.state().ended for run in ended),
            "runs go on elsewhere",
        )
        _until(runs, lambda: _gone(half_dead.rank), "the rank of the half-dead node ends by itself")
        yield Story(jobs, limited, half_dead, dead, cut_off)
        jobs.end_all()
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.down()


def _profile(folder: Path, *, networks: bool, **settings: str) -> Path:
    content = yaml.safe_load(PROFILE.read_text()) | {"cordon_file": str(folder / "cordoned.txt"), "exclusive": True}
    content |= settings
    if networks:
        content["environment"]["GLOO_SOCKET_IFNAME"] = {"value": "eth0", "reason": "nodes have networks of their own"}
    file = folder / ("short.yaml" if settings else "test.yaml")
    file.write_text(yaml.safe_dump(content))
    return file


def _all_hit(cluster: Cluster, losses: list[Loss]) -> bool:
    """Do to each run what it is for, as soon as it has come far enough."""
    for loss in losses:
        if not loss.node and loss.run.step() >= loss.step:
            loss.rank = loss.run.rank(0)
            node = expand_hostlist(loss.run.state().nodes)[loss.which]
            loss.fault(cluster, node)
            loss.node = node
    return all(loss.node for loss in losses)


def _until(runs: list[Run], condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "\n".join([what, *(run.report() for run in runs)])
        for run in runs:
            if scheduler.lift_wait(run.job) and run.folder.name == "limited":
                run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
        time.sleep(POLL_S)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _assert_nothing_of_the_old_attempt(run: Run) -> None:
    """Not a line, an event or a checkpoint of the first attempt after the second has begun."""
    starts = run.events("launch")
    assert [event["attempt"] for event in starts] == [1, 2], run.report()
    lines = (run.folder / METRICS).read_text().splitlines()
    attempts = ["2" if '"attempt": 2' in line else "1" for line in lines]
    assert attempts == sorted(attempts)
    later = [event for event in run.events() if event["time"] > starts[1]["time"]]
    assert later and all(event["attempt"] == 2 for event in later), later
    store = Store.of_run(run.folder)
    assert store.info(store.steps()[-1])["attempt"] == 2


def test_ranks_that_outlive_their_slurmd_are_fenced_out(story: Story) -> None:
    """SLURM started the job elsewhere while the old attempt still trained."""
    run = story.half_dead.run
    assert run.state().nodes != story.half_dead.node
    run.until(lambda: run.events("save_committed")[-1]["attempt"] == 2, "the new attempt saves")
    _assert_nothing_of_the_old_attempt(run)
    # It is fenced out by the new attempt, or sees the death of the process that watched it, saves and ends before that.
    ends = ("belongs to attempt", "stopped on request")
    assert any(end in (run.folder / "logs" / "attempt_1" / "rank_0.log").read_text() for end in ends)


def test_a_dead_node_is_replaced_by_a_spare(story: Story, reference: list[dict[str, Any]]) -> None:
    if story.dead is None:
        pytest.skip("nodes share the machine's name (not root): nobody can tell whose a process is")
    _assert_replaced(story.dead, reference)


def test_a_node_that_is_cut_off_is_as_good_as_dead(story: Story, reference: list[dict[str, Any]]) -> None:
    """Its ranks and the process that watches them live on; the folder of the run is all that they still share."""
    if story.cut_off is None:
        pytest.skip("no network namespaces (not root)")
    _assert_replaced(story.cut_off, reference)
    run = story.cut_off.run
    _assert_nothing_of_the_old_attempt(run)
    (log,) = run.folder.glob("launch/001/submitit/*_log.out")
    run.until(lambda: "belongs to attempt" in log.read_text(), "the old job's own process ends")


def _assert_replaced(loss: Loss, reference: list[dict[str, Any]]) -> None:
    run = loss.run
    assert run.state().state == "COMPLETED" and run.state().restarts == 1, run.report()
    first, last = (expand_hostlist(event["nodes"]) for event in run.events("launch"))
    assert loss.node in first and loss.node not in last and len(last) == 2
    assert_equal(run, reference)
    (cordoned,) = run.events("cordoned")
    assert list(cordoned["nodes"]) == [loss.node]


def test_a_time_limit_costs_no_step(story: Story, reference: list[dict[str, Any]]) -> None:
    run = story.limited
    assert run.state().state == "COMPLETED" and run.state().restarts >= 1, run.report()
    assert {event["signal"] for event in run.events("stop")} == {"SIGUSR2"}
    assert steps_done_again(run) == 0
    assert_equal(run, reference)


def test_later_launches_leave_the_lost_nodes_out(story: Story) -> None:
    lost = {loss.node for loss in (story.half_dead, story.dead, story.cut_off) if loss is not None}
    planned = submit.plan_launch(
        story.jobs.config, [f"run.dir={story.jobs.folder}", "run.name=later"], cluster=str(story.jobs.profile)
    )
    (line,) = [line for line in submit.script(planned).splitlines() if line.startswith("#SBATCH --exclude=")]
    assert set(line.removeprefix("#SBATCH --exclude=").split(",")) == lost
