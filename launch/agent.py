"""Elastic agents and ranks under torchrun.

`ranks: torchrun` of a profile: one elastic agent per node starts that node's ranks, and restarts them in place after a
crash. srun starts `python -m launch.agent node`, agents start `python -m launch.agent rank`; job.py decides what
follows.

This module changes three behaviours of torchrun 2.13:

- Restarted ranks read addresses of dead ranks, because all rounds share one store. Here each round has its own store
  (TORCH_DISABLE_SHARE_RDZV_TCP_STORE).
- Nodes are numbered in the order of their arrival. Here node and rank numbers are SLURM's, in every round.
- Every exit status except 0 counts as a crash. Here a status that a restart would not change (stopped on request, wrong
  configuration, ...) is written to a file for the job, and the rank ends with 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launch import failures
from launch.failures import Failure
from launch.policy import FINAL, STOPPED, first_failure
from mmscale.checkpoint.layout import Store
from mmscale.errors import UsageError
from mmscale.resilience import lease
from mmscale.runs.attempts import next_attempt, settings_name
from mmscale.runs.events import EventLog, read_events
from mmscale.runtime.rank_env import expand_hostlist

IN_PLACE = "in_place"  # action of "ranks_ended": an agent restarted the ranks, not the job
_KEPT = (*FINAL, STOPPED)
_STATUS, _EARLIER = "status_", "earlier_status_"  # of the present round of ranks, and of the one before


def node_command(
    train: Sequence[str], *, logs: Path, head: str, port: int, nodes: int, tasks: int, max_restarts: int
) -> list[str]:
    """Arguments of Python for one srun task per node.

    Args:
        train: arguments of `mmscale` for every rank.
        logs: folder of the ranks' output.
        head: host of node 0.
        port: rendezvous port of the agents on that host.
        nodes: number of nodes.
        tasks: ranks on each node.
        max_restarts: how often an agent restarts its ranks.
    """
    numbers = [str(number) for number in (port, nodes, tasks, max_restarts)]
    return ["-m", "launch.agent", "node", str(logs), head, *numbers, *train]


def _node(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Run this node's agent in this process, and remove the folder that torchrun creates for its ranks' files."""
    logs, head, port, nodes, tasks, restarts, *train = arguments
    number = int(environ["SLURM_NODEID"])
    # SLURM sends a request to save, and SIGTERM of a preemption, to every process of a step. The ranks handle it. The
    # agent ignores it: torchrun would kill the ranks after 30 s and end with an error. Ranks start with these signals
    # blocked, so a signal that arrives before their handlers are installed stays pending.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    command = [f"--nnodes={nodes}", f"--nproc-per-node={tasks}"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}", f"--rdzv-conf=is_host={int(number == 0)}"]
    command += [f"--rdzv-id={environ.get('MMSCALE_ATTEMPT_ID', 'mmscale')}", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.5", "--signals-to-handle=SIGINT,SIGQUIT"]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.Formatter.converter = time.gmtime  # failures.py reads the log, maybe in another time zone: of a container
    with tempfile.TemporaryDirectory(prefix="torchelastic_") as folder:
        sys.argv = ["torchrun", *command, f"--log-dir={folder}", "--module", "launch.agent", "rank", logs, head, *train]
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def _rank(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Train as one rank; returns the exit status for the agent."""
    logs, head, *train = arguments
    rank = int(environ["SLURM_NODEID"]) * int(environ["LOCAL_WORLD_SIZE"]) + int(environ["LOCAL_RANK"])
    os.environ.update(RANK=str(rank), GROUP_RANK=environ["SLURM_NODEID"], MASTER_ADDR=head)
    output = os.open(f"{logs}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    retire_status(Path(logs), rank)
    if rank == 0:
        begin_attempt(Path(logs).parents[1], Path(logs), environ)
    sys.argv = ["mmscale", *train]
    status: object = 0
    try:
        runpy.run_module("mmscale", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    if status in _KEPT:
        Path(logs, f"{_STATUS}{rank}").write_text(f"{status}\n")
        return 0
    return status if isinstance(status, int) else int(status is not None)


def begin_attempt(run: Path, logs: Path, environ: Mapping[str, str]) -> None:
    """Start a new attempt in the run's files if ranks of the present attempt have run before.

    The lease stays the same. Only rank 0 writes these files, and the agent has ended the old rank 0 before it starts
    this one.

    Raises:
        FencedError: another job has taken over the run.
    """
    given = lease.launched_attempt(run, environ)
    if given is None or not (run / settings_name(given)).exists():
        return
    number, lease_id = next_attempt(run), environ[lease.VARIABLE]
    lease.renew(run, lease_id, attempt=number)
    fence = lease.Fence(run, lease_id)
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    began = [event for event in read_events(run) if (event["event"], event.get("attempt")) == ("launch", given)]
    failed = first_failed(
        logs,
        expand_hostlist(nodes),
        tasks=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        since=float(began[0]["time"]) if began else 0.0,
        restarted=True,
    )
    with contextlib.closing(EventLog(run, given, may_write=fence.check)) as events:
        why = "torchrun starts the ranks again" + (f": {failed}" if failed else "")
        newest = max(Store.of_run(run).steps(), default=0)
        named = {"failed": asdict(failed)} if failed else {}
        events.add("ranks_ended", attempt_id=lease_id, action=IN_PLACE, why=why, checkpoint=newest, **named)
    with contextlib.closing(EventLog(run, number, may_write=fence.check)) as events:
        events.add("launch", attempt_id=lease_id, in_place=True, nodes=nodes, job=environ.get("SLURM_JOB_ID", ""))


def retire_status(logs: Path, rank: int) -> None:
    """Move away the status of this rank's last round, which says nothing about the round that starts now."""
    try:
        (logs / f"{_STATUS}{rank}").replace(logs / f"{_EARLIER}{rank}")
    except FileNotFoundError:
        (logs / f"{_EARLIER}{rank}").unlink(missing_ok=True)


def statuses(logs: Path, *, prefix: str = _STATUS, since: float = 0.0) -> dict[int, int]:
    """Exit statuses by rank that were withheld from the agents in the present round of ranks.

    Args:
        logs: folder of the ranks' output.
        prefix: of the files' names.
        since: leaves out files that were written before [seconds since 1970].
    """
    found = {}
    for file in logs.glob(f"{prefix}*"):
        name = re.fullmatch(rf"{prefix}(\d+)", file.name)
        try:
            text = file.read_text().strip() if file.stat().st_mtime >= since else ""
        except FileNotFoundError:  # its rank has started again
            continue
        if name and text.isdigit():  # a file without a status is still being written
            found[int(name[1])] = int(text)
    return found


def first_failed(
    logs: Path, nodes: Sequence[str], *, tasks: int, since: float, restarted: bool = False
) -> Failure | None:
    """The rank that failed first; one with a status that needs a person takes precedence.

    Args:
        logs: folder of the ranks' and the agents' output.
        nodes: their names, in SLURM's order.
        tasks: ranks on each node.
        since: when this round of ranks was started [seconds since 1970].
        restarted: the next round has begun, and some of its ranks have set their last statuses aside.
    """
    found = statuses(logs)
    if restarted:
        found = statuses(logs, prefix=_EARLIER, since=since) | statuses(logs, since=since)
    kept = [(rank, status) for rank, status in sorted(found.items()) if rank < tasks * len(nodes)]
    withheld = [Failure(str(rank), nodes[rank // tasks], status) for rank, status in kept if status in FINAL]
    return first_failure([*withheld, *failures.of_agents(logs, nodes, tasks=tasks, since=since)])


def true_status(logs: Path, status: int) -> int:
    """The ranks' exit status: one withheld from the agents, errors that need a person first; otherwise `status`."""
    kept = statuses(logs).values()
    return next((one for one in FINAL if one in kept), STOPPED if STOPPED in kept else status)


def main(arguments: Sequence[str]) -> int:
    """Run as an agent or as a rank; job.py passes the arguments."""
    if len(arguments) > 2 and arguments[0] == "rank":
        return _rank(arguments[1:], os.environ)
    if len(arguments) > 6 and arguments[0] == "node" and "SLURM_NODEID" in os.environ:
        _node(arguments[1:], os.environ)
        return 0
    raise UsageError(
        "python -m launch.agent is started by a job whose profile says `ranks: torchrun`",
        remedy="mmscale launch CONFIG --cluster NAME",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
