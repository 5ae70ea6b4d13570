"""A run that everything happens to, in random order, ends with the losses of one that nothing happened to.

Ranks are stubs, so that a fault costs seconds; `make test-all` does 30. MMSCALE_EVENTS is their number, MMSCALE_SEED
repeats what a failure printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import chain, control, scheduler
from launch.job_states import Phase
from launch.job_table import JobTable
from mmscale.runs.metrics import METRICS, read_metrics
from mmscale.runtime.rank_env import expand_hostlist
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, Run, shown
from tests.slurm.stub_rank import losses

EVENTS = int(os.environ.get("MMSCALE_EVENTS", "30"))
SEED = int(os.environ.get("MMSCALE_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)


class Soak:
    """A run and what is done to it. Each event leaves it training, perhaps in another job."""

    def __init__(self, cluster: Cluster, launch: Callable[[], Run]) -> None:
        self.cluster, self.launch = cluster, launch
        self.run = launch()

    def kill_rank(self) -> None:
        """A crash: restarted in place."""
        with self.another_attempt():
            os.kill(self.run.rank(0), signal.SIGKILL)

    def outage(self) -> None:
        """The same while slurmctld is away."""
        before = len(self.run.events("ranks_ended"))
        with self.another_attempt():
            rank = self.run.rank(0)
            self.cluster.stop_controller()
            try:
                os.kill(rank, signal.SIGKILL)
                self.run.until(lambda: len(self.run.events("ranks_ended")) > before, "it is noticed", lift=False)
            finally:
                self.cluster.start_controller()

    def time_limit(self) -> None:
        """The job's time is over in a minute or two."""
        with self.another_attempt():
            elapsed = int(self.cluster.run("squeue", "-h", "-j", self.run.job, "-O", "TimeUsed").split(":")[-2])
            self.update(f"TimeLimit={elapsed + 2}")
            self.run.until(lambda: bool(self.lately("stop")), "it is asked to save")
            self.run.until(lambda: self.run.state().phase is not Phase.RUNNING, "the job ends")
            self.update("TimeLimit=30")

    def requeue(self) -> None:
        """Somebody else requeues it."""
        with self.another_attempt():
            scheduler.requeue(self.run.job)

    def preemption(self) -> None:
        """An urgent job takes all nodes, after a time of grace."""
        with self.another_attempt():
            self.urgent()

    def preemption_without_grace(self) -> None:
        """An urgent job takes all nodes at once, and preempted jobs are cancelled."""
        partition = ("scontrol", "update", "PartitionName=main")
        self.cluster.run(*partition, "PreemptMode=CANCEL", "GraceTime=0")
        try:
            with self.another_attempt():
                self.urgent()
                self.taken_over()
        finally:
            self.cluster.run(*partition, "PreemptMode=REQUEUE", "GraceTime=60")

    def cancelled(self) -> None:
        """`scancel` of the job that trains."""
        with self.another_attempt():
            scheduler.cancel(self.run.job)
            self.taken_over()

    def stopped(self) -> None:
        """`mmscale stop`, which ends the chain, and `resume`."""
        with self.another_attempt():
            control.stop(self.run.folder)
            self.taken_over()

    def no_requeue(self) -> None:
        """Asked to make room where requeue is forbidden."""
        with self.another_attempt():
            self.update("Requeue=0")
            scheduler.cancel(self.run.job, signal="USR2", batch_only=True)
            self.taken_over()

    def node_death(self) -> None:
        """All processes of a node, its slurmd too."""
        node = expand_hostlist(self.run.state().nodes)[0]
        with self.another_attempt():
            self.cluster.kill(node)
        self.cluster.restore()

    def urgent(self) -> None:
        """Somebody's job on all nodes."""
        self.cluster.run("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")

    def update(self, change: str) -> None:
        """Change the job that trains."""
        self.cluster.run("scontrol", "update", f"JobId={self.run.job}", change)

    def taken_over(self) -> None:
        """The job ends, and the next one of the chain goes on; or a person resumes, where there is none."""
        self.run.until_ended()
        behind = chain.alive(chain.links(self.run.folder, JobTable()))
        self.run = dataclasses.replace(self.run, job=behind[0].key.id) if behind else self.launch()

    def lately(self, name: str) -> list[dict[str, Any]]:
        """Events of the newest attempt."""
        events = self.run.events()
        return [event for event in events if event["attempt"] == events[-1]["attempt"] and event["event"] == name]

    @contextlib.contextmanager
    def another_attempt(self) -> Iterator[None]:
        """Wait until an attempt later than the one that trains now has logged a few steps."""
        attempt, before = self.run.attempt(), self.run.step()
        yield
        self.trains(attempt + 1, before + 2)

    def trains(self, attempt: int, step: int) -> None:
        """An attempt has come to a step."""
        self.run.until(
            lambda: self.run.attempt() >= attempt and self.run.step() >= step, f"attempt {attempt} comes to step {step}"
        )


@pytest.mark.exhaustive
def test_everything_happens_to_a_run(jobs: Jobs, cluster: Cluster) -> None:
    draw = random.Random(SEED)
    cordoned = jobs.folder / "cordoned.txt"
    profile = jobs.folder / "soak.yaml"
    settings = {"cordon_file": str(cordoned), "chain": 3}
    profile.write_text(yaml.safe_dump(yaml.safe_load(jobs.profile.read_text()) | settings))
    generous = ("resilience.max_restarts=1000", "resilience.max_restarts_without_progress=1000")
    wanted = Jobs(cluster, jobs.config, profile, jobs.folder, jobs.runs)
    asked = (f"train.steps={10_000 * EVENTS}", *generous)
    soak = Soak(cluster, lambda: wanted.launch(*asked, nodes=1, slow_s=0.1, stub=True))
    soak.trains(1, 2)
    happenings: list[Callable[[], None]] = [
        *(soak.kill_rank, soak.outage, soak.time_limit, soak.requeue, soak.preemption, soak.preemption_without_grace),
        *(soak.cancelled, soak.stopped, soak.no_requeue),
        *([soak.node_death] if cluster.own_names else []),
    ]
    order = [happening for _ in range(EVENTS) for happening in draw.sample(happenings, len(happenings))][:EVENTS]
    began = time.monotonic()
    for number, happening in enumerate(order, start=1):
        sys.stderr.write(f"seed {SEED}, event {number}: {happening.__name__}\n")
        happening()
        cordoned.unlink(missing_ok=True)
    soak.trains(soak.run.attempt(), soak.run.step() + 10)
    steps, again = _undisturbed(soak.run)
    counts = ", ".join(f"{number} {name}" for name, number in sorted(Counter(one.__name__ for one in order).items()))
    sys.stderr.write(
        f"{EVENTS} events in {time.monotonic() - began:.0f} s ({counts}): {soak.run.attempt()} attempts of "
        f"{len(soak.run.events('launch'))} starts in {len(chain.keys(soak.run.folder))} jobs, "
        f"{steps} steps, {again} of them done again\n"
    )
    control.stop(soak.run.folder)
    assert soak.run.until_ended().state == "COMPLETED", soak.run.report()
    assert shown(soak.run)["state"] == "stopped"


def _undisturbed(run: Run) -> tuple[int, int]:
    """Every step is there, with the loss of an undisturbed run; no attempt wrote once a later one had begun.

    Returns:
        How many steps there are, and how many were done again.
    """
    lines = read_metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["loss"] for line in lines] == losses(len(lines))
    written = Path(run.folder / METRICS).read_text().splitlines()
    attempts = [json.loads(text)["attempt"] for text in written[:-1]]  # the last one may be half written
    assert attempts == sorted(attempts)
    return len(lines), max(0, len(written) - len(lines))
