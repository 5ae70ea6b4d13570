"""A run that everything happens to, in random order, ends with the losses of one that nothing happened to.

Ranks are stubs, so that a fault costs seconds; `make test-all` does 30. MMSCALE_EVENTS is their number, MMSCALE_SEED
repeats what a failure printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import control, scheduler
from mmscale.runtime.rank_env import expand_hostlist
from mmscale.train.metrics import METRICS, read_metrics
from slurm.local_cluster import Cluster
from tests.slurm.jobs import Jobs, Run, shown
from tests.slurm.stub_rank import loss

EVENTS = int(os.environ.get("MMSCALE_EVENTS", "30"))
SEED = int(os.environ.get("MMSCALE_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)


class Soak:
    """A run and what is done to it. Each event leaves it running, perhaps as another job."""

    def __init__(self, cluster: Cluster, launch: Callable[[], Run]) -> None:
        self.cluster, self.launch = cluster, launch
        self.run = launch()

    def kill_rank(self) -> None:
        """A crash: restarted in place."""
        attempt = self.run.attempt()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.run.rank(0), signal.SIGKILL)
        self.trains(attempt + 1)

    def outage(self) -> None:
        """The same while slurmctld is away."""
        attempt = self.run.attempt()
        self.cluster.stop_controller()
        os.kill(self.run.rank(0), signal.SIGKILL)
        self.run.until(lambda: len(self.run.events("ranks_ended")) >= attempt, "it is noticed", lift=False)
        self.cluster.start_controller()
        self.trains(attempt + 1)

    def time_limit(self) -> None:
        """What SLURM sends before a time limit."""
        attempt = self.run.attempt()
        scheduler.cancel(self.run.job, signal="USR2", batch_only=True)
        self.trains(attempt + 1)

    def requeue(self) -> None:
        """Somebody else requeues it."""
        attempt = self.run.attempt()
        scheduler.requeue(self.run.job)
        self.trains(attempt + 1)

    def preemption(self) -> None:
        """An urgent job takes all nodes."""
        attempt = self.run.attempt()
        self.cluster.run("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        self.trains(attempt + 1)

    def cancelled(self) -> None:
        """`scancel`, and a person who resumes."""
        scheduler.cancel(self.run.job)
        self.resumed()

    def stopped(self) -> None:
        """`mmscale stop` and `resume`."""
        control.stop(self.run.folder)
        self.resumed()

    def no_requeue(self) -> None:
        """Preempted where requeues are off: it ends as stopped, and a person resumes."""
        self.cluster.run("scontrol", "update", f"JobId={self.run.job}", "Requeue=0")
        scheduler.cancel(self.run.job, signal="USR2", batch_only=True)
        self.resumed()

    def node_death(self) -> None:
        """All processes of a node, its slurmd too."""
        attempt, node = self.run.attempt(), expand_hostlist(self.run.state().nodes)[0]
        for pid in [self.cluster.slurmd(node), *self.cluster.processes(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.trains(attempt + 1)
        self.cluster.restore()

    def resumed(self) -> None:
        """The job ends, and another one goes on."""
        attempt = self.run.attempt()
        self.run.until_ended()
        self.run = self.launch()  # as `mmscale resume`, with stubs again
        self.trains(attempt + 1)

    def trains(self, attempt: int) -> None:
        """An attempt has logged a few steps."""
        before = self.run.step()
        self.run.until(
            lambda: self.run.attempt() >= attempt and self.run.step() >= before + 2, f"attempt {attempt} trains"
        )


@pytest.mark.exhaustive
def test_everything_happens_to_a_run(jobs: Jobs, cluster: Cluster) -> None:
    draw = random.Random(SEED)
    cordoned = jobs.folder / "cordoned.txt"
    profile = jobs.folder / "soak.yaml"
    profile.write_text(yaml.safe_dump(yaml.safe_load(jobs.profile.read_text()) | {"cordon_file": str(cordoned)}))
    steps = 200 * EVENTS
    generous = ("resilience.max_restarts=1000", "resilience.max_restarts_without_progress=1000")
    wanted = Jobs(cluster, jobs.config, profile, jobs.folder, jobs.runs)
    settings = (f"train.steps={steps}", *generous)
    soak = Soak(cluster, lambda: wanted.launch(*settings, nodes=1, slow_s=0.1, stub=True))
    soak.trains(1)
    happenings: list[Callable[[], None]] = [
        *(soak.kill_rank, soak.outage, soak.time_limit, soak.requeue, soak.preemption),
        *(soak.cancelled, soak.stopped, soak.no_requeue),
        *([soak.node_death] if cluster.own_names else []),
    ]
    order = [happening for _ in range(EVENTS) for happening in draw.sample(happenings, len(happenings))][:EVENTS]
    for number, happening in enumerate(order, start=1):
        sys.stderr.write(f"seed {SEED}, event {number}: {happening.__name__}\n")
        happening()
        cordoned.unlink(missing_ok=True)
    reach = soak.run.step() + 10
    soak.run.until(lambda: soak.run.step() >= reach, "it goes on")
    _assert_undisturbed(soak.run)
    control.stop(soak.run.folder)
    assert soak.run.until_ended().exit_status == 75, soak.run.report()
    assert shown(soak.run)["state"] == "stopped"


def _assert_undisturbed(run: Run) -> None:
    """Every step is there, with the loss of an undisturbed run; no attempt wrote once a later one had begun."""
    lines = read_metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(line["loss"] == pytest.approx(loss(line["step"])) for line in lines)
    attempts = [json.loads(text)["attempt"] for text in Path(run.folder / METRICS).read_text().splitlines()]
    assert attempts == sorted(attempts)
