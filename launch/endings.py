"""How ranks ended, by their own record first, then by the signals to the supervisor; and what agents restarted.

Determines how the ranks of an attempt ended. job.py calls it afterwards, and policy.py decides what follows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import agent, failures, hangs
from launch import rank_command as ranks
from launch.disk import Disk
from launch.failures import Failure
from launch.policy import FINAL, Ending, crashed, first_failure, known_status, lost_work
from launch.record import Record
from mmscale.runs.events import EventLog, read_events


def ending_of(
    status: int,
    events: Sequence[Mapping[str, Any]],
    *,
    signals: Sequence[str],
    failed: Failure | None,
    stop_asked: bool,
    cause: Callable[[], str],
) -> Ending:
    """How the ranks ended.

    Args:
        status: of srun, or of the local launcher.
        events: of the attempt.
        signals: that the supervisor received in the meantime, in order.
        failed: the rank that failed first.
        stop_asked: whether a stop of this launch was requested.
        cause: returns the cause of a crash.
    """
    named = next((event.get("signal") for event in events if event["event"] == "stop"), None)
    if "SIGUSR1" in signals:
        named = "SIGUSR1"
    elif signals:
        named = signals[-1]
    ending = Ending(known_status(status, events, failed), named, stop_asked, lost_work=lost_work(events))
    if crashed(ending) or ending.unsaved:
        return replace(ending, cause=cause(), failed=failed)
    return replace(ending, failed=failed) if ending.status in FINAL else ending


def first_failed(
    record: Record, *, by_agents: bool, logs: Path, events: Sequence[Mapping[str, Any]], said: str
) -> Failure | None:
    """The rank that failed first; None without SLURM, where the local launcher prints it.

    Args:
        record: of the launch.
        by_agents: torchrun's agents started the ranks.
        logs: of the attempt.
        events: of the attempt.
        said: output of srun.
    """
    if not by_agents:
        return first_failure(failures.of_srun(said))
    since = next((float(event["time"]) for event in events if event["event"] == "launch"), 0.0)
    return agent.first_failed(logs, ranks.hosts(os.environ), tasks=record.tasks_per_node, since=since)


def after_restarts_in_place(
    record: Record, disk: Disk, run: Path, attempt: int, lease_id: str, events: EventLog
) -> int:
    """Count restarts by agents, and record the hangs that caused them; returns the attempt that ran last.

    Args:
        record: of the launch.
        disk: stores the budget.
        run: the run's folder.
        attempt: that the supervisor started.
        lease_id: of that attempt and of those that agents started.
        events: receives hangs; later events belong to the last attempt.
    """
    found = [event for event in read_events(run) if event.get("attempt_id") == lease_id]
    for event in found:
        if event["event"] != "ranks_ended" or event.get("action") != agent.IN_PLACE:
            continue
        disk.keep(disk.budget().ended(step=int(event["checkpoint"]), crashed=True))
        hangs.record_hang(record, int(event["attempt"]), lease_id, events)
    last = max((int(event["attempt"]) for event in found), default=attempt)
    events.attempt = last
    return last
