# `ranks: torchrun` of a profile: one elastic agent per node starts that node's ranks, and again in place when one died.
# srun starts `python -m launch.agent node`, agents start `python -m launch.agent rank`; job.py decides what follows.
"""Ranks below torchrun.

What torchrun 2.13 does not do by itself, and this adds:

- Its restarted ranks read addresses of dead ones, because all rounds share one store; each round gets one of its own
  (TORCH_DISABLE_SHARE_RDZV_TCP_STORE).
- It numbers nodes as they come; here node and rank numbers are SLURM's, in every round.
- It takes every exit status but 0 for a crash. One that trying again would not change (stopped on request, bad
  configuration, ...) is written down for the job instead, and the rank ends with 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.policy import FINAL, STOPPED
from mmscale.checkpoint.layout import Store
from mmscale.errors import UsageError
from mmscale.resilience import lease
from mmscale.train.metrics import EventLog, next_attempt

IN_PLACE = "in_place"  # action of "ranks_ended": an agent, and not the job, started ranks again
_KEPT = (*FINAL, STOPPED)


def node_command(
    train: Sequence[str], *, logs: Path, head: str, port: int, nodes: int, tasks: int, max_restarts: int
) -> list[str]:
    """Arguments of Python for one srun task per node.

    Args:
        train: arguments of `mmscale` for every rank.
        logs: folder of the ranks' output.
        head: host of node 0.
        port: where the agents meet there.
        nodes: how many.
        tasks: ranks on each.
        max_restarts: how often an agent starts its ranks again.
    """
    numbers = [str(number) for number in (port, nodes, tasks, max_restarts)]
    return ["-m", "launch.agent", "node", str(logs), head, *numbers, *train]


def _node(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Be the agent of this node, in this process; torchrun leaves a folder of files of its ranks, which is removed."""
    logs, head, port, nodes, tasks, restarts, *train = arguments
    number = int(environ["SLURM_NODEID"])
    # SLURM sends a request to save to every process of a step, SIGTERM of a preemption too: it is the ranks' business.
    # torchrun would give them 30 s for SIGTERM, and end with an error. They begin with the signals blocked as well, so
    # that one which comes before they listen waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    command = [f"--nnodes={nodes}", f"--nproc-per-node={tasks}"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}", f"--rdzv-conf=is_host={int(number == 0)}"]
    command += [f"--rdzv-id={environ.get('MMSCALE_ATTEMPT_ID', 'mmscale')}", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.5", "--signals-to-handle=SIGINT,SIGQUIT"]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="torchelastic_") as folder:
        sys.argv = ["torchrun", *command, f"--log-dir={folder}", "--module", "launch.agent", "rank", logs, head, *train]
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def _rank(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Train as one rank; its exit status for the agent."""
    logs, head, *train = arguments
    rank = int(environ["SLURM_NODEID"]) * int(environ["LOCAL_WORLD_SIZE"]) + int(environ["LOCAL_RANK"])
    os.environ.update(RANK=str(rank), GROUP_RANK=environ["SLURM_NODEID"], MASTER_ADDR=head)
    output = os.open(f"{logs}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    if rank == 0:
        begin_attempt(Path(logs).parents[1], environ)
    sys.argv = ["mmscale", *train]
    status: object = 0
    try:
        runpy.run_module("mmscale", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    if status in _KEPT:
        Path(logs, f"status_{rank}").write_text(f"{status}\n")
        return 0
    return status if isinstance(status, int) else int(status is not None)


def begin_attempt(run: Path, environ: Mapping[str, str]) -> None:
    """Begin an attempt of its own if ranks of this one have run before, in the files that nobody else could write.

    Under the same lease: the agent has ended the old rank 0, which alone writes, before it started this one.

    Raises:
        FencedError: another job has taken the run over.
    """
    given = lease.launched_attempt(run, environ)
    if given is None or not (run / f"config.{given}.yaml").exists():
        return
    number, lease_id = next_attempt(run), environ[lease.VARIABLE]
    lease.renew(run, lease_id, attempt=number)
    fence = lease.Fence(run, lease_id)
    with contextlib.closing(EventLog(run, given, may_write=fence.check)) as events:
        why = "torchrun starts the ranks again"
        newest = max(Store.of_run(run).steps(), default=0)
        events.add("ranks_ended", attempt_id=lease_id, action=IN_PLACE, why=why, checkpoint=newest)
    with contextlib.closing(EventLog(run, number, may_write=fence.check)) as events:
        nodes = environ.get("SLURM_JOB_NODELIST", "")
        events.add("launch", attempt_id=lease_id, in_place=True, nodes=nodes, job=environ.get("SLURM_JOB_ID", ""))


def statuses(logs: Path) -> dict[int, int]:
    """Exit statuses by rank that its agent was not told."""
    found = {}
    for file in logs.glob("status_*"):
        name = re.fullmatch(r"status_(\d+)", file.name)
        text = file.read_text().strip()
        if name and text.isdigit():  # one without is being written
            found[int(name[1])] = int(text)
    return found


def true_status(logs: Path, status: int) -> int:
    """How ranks ended: by what agents were not told, first what a person has to mend; else as they ended."""
    kept = statuses(logs).values()
    return next((one for one in FINAL if one in kept), STOPPED if STOPPED in kept else status)


def main(arguments: Sequence[str]) -> int:
    """One of the two; job.py writes the arguments."""
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
