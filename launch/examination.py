# What a job does about its nodes before ranks start: has them examined, and hands the run over to a job without those
# that are unfit. How nodes are examined is nodes.py's, which jobs there are successors.py's.
"""Nodes of a job before its ranks start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import nodes
from launch.allocation import Allocation
from launch.profile import Profile
from launch.record import Record
from launch.successors import Successors
from mmscale.errors import LaunchError
from mmscale.runtime.rank_env import unused_port
from mmscale.train.metrics import EventLog, next_attempt, read_events


class Examination:
    """Of one start of a job.

    Args:
        record: of the launch.
        profile: of the cluster.
        allocation: the job.
        successors: the other jobs of the launch.
        restart: how often SLURM has started the job again.
        log: gives the events of an attempt.
        interrupted: whether the job was asked to end, with a question to SLURM: a check that SLURM ended says nothing.
        stopping: the same without a question.
    """

    def __init__(
        self,
        record: Record,
        profile: Profile,
        allocation: Allocation,
        successors: Successors,
        *,
        restart: int,
        log: Callable[[int], EventLog],
        interrupted: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        self._record = record
        self._profile = profile
        self._allocation = allocation
        self._successors = successors
        self._restart = restart
        self._log = log
        self._interrupted = interrupted
        self._stopping = stopping
        self._run = Path(record.run)

    def lost_nodes(self) -> dict[str, str]:
        """Nodes that died under this job or the one before it, if they are new in the cordon file."""
        mine = [event for event in read_events(self._run) if event["event"] == "launch"]
        last, job = str(mine[-1].get("job", "")) if mine else "", self._allocation.job
        if not job or not (self._successors.took_over(last) or (self._restart > 0 and last == job)):
            return {}
        found = self._allocation.lost_nodes(str(mine[-1].get("nodes", "")))
        return nodes.cordon(self._record, self._profile, found, reason=f"lost by job {last}")

    def run(self, task: Callable[[], None]) -> dict[str, Any]:
        """Examine the nodes, then how fast they are together.

        Args:
            task: what submitit pickles for a job that goes on without unfit nodes.

        Returns:
            Bus bandwidths of all-reduces [GB/s], as `nodes.measure` gives them.

        Raises:
            LaunchError: one is not fit.
        """
        bandwidth: dict[str, Any] = {}
        bad = nodes.examine(self._record, self._profile, interrupted=self._interrupted, stopping=self._stopping)
        if not bad and not self._stopping():
            bad, bandwidth = nodes.measure(
                self._record,
                self._profile,
                port=unused_port(),
                interrupted=self._interrupted,
                stopping=self._stopping,
            )
        if bad:
            self._refuse(bad, task)
        return bandwidth

    def _refuse(self, bad: dict[str, nodes.Unfit], task: Callable[[], None]) -> None:
        """End the job before ranks start; another one goes on without nodes that have a fault of their own.

        SLURM changes the nodes that a job excludes only while it waits: requeued, this one could get the same again.

        Raises:
            LaunchError: always.
        """
        unfit = nodes.at_fault(self._record, self._profile, bad)
        refusal = nodes.refusal(self._record, self._profile, bad)
        taken = self._successors.without(unfit, task)
        with contextlib.closing(self._log(next_attempt(self._run))) as events:
            said = {node: one.text for node, one in sorted(bad.items())}
            events.add("preflight_failed", job=self._allocation.job, restart=self._restart, nodes=said)
            if taken:
                events.add("handed_over", job=taken, without=unfit, why="unfit nodes")
        if taken:
            raise LaunchError(refusal.cause, remedy=f"none is needed: job {taken} goes on without {', '.join(unfit)}")
        raise refusal
