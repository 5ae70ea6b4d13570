"""Node checks before the ranks of a job start.

Checks of a job's nodes before ranks start: runs the checks, and hands the run over to a job without unfit nodes.
nodes.py checks nodes, successors.py manages the jobs.
"""

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
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EventLog, read_events
from mmscale.runtime.rank_env import unused_port


class Examination:
    """The node checks of one start of a job.

    Args:
        record: of the launch.
        profile: of the cluster.
        allocation: the job.
        successors: the other jobs of the launch.
        restart: how often SLURM has restarted the job.
        log: returns the events of an attempt.
        interrupted: whether the job was asked to end, including a query to SLURM: an interrupted check has no result.
        stopping: the same without a query.
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
        """Nodes that died under this job or the previous one and are new in the cordon file."""
        mine = [event for event in read_events(self._run) if event["event"] == "launch"]
        last, job = str(mine[-1].get("job", "")) if mine else "", self._allocation.job
        if not job or not (self._successors.took_over(last) or (self._restart > 0 and last == job)):
            return {}
        found = self._allocation.lost_nodes(str(mine[-1].get("nodes", "")))
        return nodes.cordon(self._record, self._profile, found, reason=f"lost by job {last}")

    def run(self, task: Callable[[], None]) -> dict[str, Any]:
        """Check the nodes, then measure the bandwidth between them.

        Args:
            task: object that submitit pickles for a job that continues without unfit nodes.

        Returns:
            Bus bandwidths of all-reduces [GB/s], as from `nodes.measure`.

        Raises:
            LaunchError: a node is unfit.
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

    def _refuse(self, bad: dict[str, nodes.UnfitNode], task: Callable[[], None]) -> None:
        """End the job before ranks start. Another job continues without nodes that have a fault of their own.

        SLURM lets a job's excluded nodes change only while the job waits; if this one were requeued, it could get the
        same nodes.

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
            raise LaunchError(refusal.cause, remedy=f"none is needed: job {taken} continues without {', '.join(unfit)}")
        raise refusal
