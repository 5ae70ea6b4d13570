# Checks the nodes of a job before its ranks start, and adds unfit or lost nodes to the cordon file. slurm/preflight.py
# and slurm/bandwidth.py run the checks; job.py decides what follows.
"""Fit and unfit nodes."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import container, scheduler
from launch import cordon as cordon_file
from launch.profile import Profile
from launch.record import Record
from mmscale import bounded
from mmscale.errors import LaunchError, shell_command
from mmscale.runtime.rank_env import expand_hostlist
from slurm.preflight import clock_problems

_TIMEOUT_S = 180.0  # a check calls a driver several times, which may hang; all nodes are checked at the same time
# Ranks import torch and rendezvous (constant), then every rank takes part in creating each node's groups (per node).
_MEASURED_S, _MEASURED_PER_NODE_S = 180.0, 2.0
# Lines that srun and slurmstepd add when a task has failed.
_REPORT = re.compile(
    r"(srun|slurmstepd): (error: )?"
    r"(\S+: tasks? [\d,-]+: (Exited|Killed|Terminated|Aborted)|Terminating|Job step|spank:)"
)
_RUNTIME_ERROR = re.compile(r"\[ERROR\]|FATAL")  # prefixes of enroot and apptainer
_OWN = frozenset({"gpus", "gpu_idle", "gpu_memory_errors", "gpu_xid", "shared_memory"})


@dataclass(frozen=True)
class UnfitNode:
    """The problems of a node.

    Attributes:
        text: each failed check, with its reason.
        cordon: whether the problem would also affect a later job, on this node and not on others. For the only node of
            a job a full file system or a program that does not run cannot be distinguished from the node's own faults.
        hardware: a device reported the fault itself, or it was measured: two nodes may have it at the same time.
    """

    text: str
    cordon: bool
    hardware: bool = False


def examine(
    record: Record,
    profile: Profile,
    *,
    interrupted: Callable[[], bool],
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, UnfitNode]:
    """Check every node of this job.

    Args:
        record: of the launch.
        profile: of the cluster: requirements of a node, and skipped checks.
        interrupted: whether this process was asked to end: an interrupted check has no result.
        stopping: the same without a query to SLURM, polled while SLURM does not answer.

    Returns:
        Nodes with a problem, and the problem.
    """
    began = time.monotonic()
    ended = _output(
        _command(record, profile),
        record,
        dict(os.environ),
        timeout_s=_TIMEOUT_S,
        patience_s=profile.slurm_patience,
        stopping=stopping,
    )
    ended.show()
    answers = ended.lines
    found: dict[str, dict[str, str]] = {one["node"]: dict(one["problems"]) for one in answers}
    if "clock" not in profile.preflight.skip:
        for node, text in clock_problems(answers, within_s=time.monotonic() - began).items():
            found[node]["clock"] = text
    if interrupted():
        return {}
    for node in expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", "")):
        found.setdefault(node, {"no answer": ended.error or "it ended silently"})
    said = {node: "; ".join(f"{name}: {text}" for name, text in problems.items()) for node, problems in found.items()}
    for node, text in sorted(said.items()):
        sys.stderr.write(f"node {node}: {text or 'ready'}\n")
    return {
        node: UnfitNode(
            said[node], record.nodes > 1 or any(_is_own(*one) for one in problems.items()), _is_hardware(problems)
        )
        for node, problems in found.items()
        if problems
    }


def _is_own(check: str, text: str) -> bool:
    """Whether a problem on the only node of a job is the node's own; a program missing on PATH is the job's problem."""
    return check in _OWN and "No such file or directory" not in text


def _is_hardware(problems: Mapping[str, str]) -> bool:
    """Whether a device is broken or missing, as reported by its driver."""
    broken = "GPUs are there" in problems.get("gpus", "")
    return broken or not {"gpu_memory_errors", "gpu_xid"}.isdisjoint(problems)


def measure(
    record: Record,
    profile: Profile,
    *,
    port: int,
    interrupted: Callable[[], bool],
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, UnfitNode], dict[str, Any]]:
    """Measure all-reduces inside the nodes of this job and between them.

    Args:
        record: of the launch.
        profile: of the cluster: minimum bandwidths.
        port: of the rendezvous on the first node.
        interrupted: as for `examine`.
        stopping: as for `examine`.

    Returns:
        Nodes with a problem, and the problem; and the measured bus bandwidths [GB/s].
    """
    wanted = profile.preflight
    if "all_reduce" in wanted.skip or record.world_size == 1:
        return {}, {}
    environment = {**os.environ, "MMSCALE_LAUNCHER": "slurm", "MASTER_PORT": str(port)}
    limit = _MEASURED_S + _MEASURED_PER_NODE_S * record.nodes
    program = ["-m", "slurm.bandwidth", f"--mb={wanted.all_reduce_mb:g}", f"--timeout-s={limit:g}"]
    ended = _output(
        _srun(record, profile, program, tasks=record.tasks_per_node),
        record,
        environment,
        timeout_s=limit,
        patience_s=profile.slurm_patience,
        stopping=stopping,
    )
    ended.show()
    lines = ended.lines
    nodes = expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))
    bad = slow_nodes(
        lines,
        nodes=nodes,
        inside_gb_s=wanted.all_reduce_inside_gb_s if record.tasks_per_node > 1 else 0.0,
        between_gb_s=wanted.all_reduce_between_gb_s,
        error=ended.error,
    )
    if interrupted():
        return {}, {}
    measured: dict[str, Any] = {
        "inside": {line["node"]: line["inside"] for line in lines if "inside" in line},
        "between": {"-".join(line["pair"]): line["between"] for line in lines if "pair" in line},
        "all": next((line["all"] for line in lines if "all" in line), None),
    }
    for name, value in {**measured["inside"], **measured["between"], "all ranks": measured["all"]}.items():
        sys.stderr.write(f"all-reduce, {name}: {'nothing' if value is None else f'{value:.2f} GB/s'}\n")
    demanded = wanted.all_reduce_inside_gb_s > 0 or wanted.all_reduce_between_gb_s > 0
    own = demanded if ended.late else record.nodes > 1 or not ended.error
    return {node: UnfitNode(text, own, "GB/s" in text) for node, text in bad.items()}, measured


def slow_nodes(
    lines: Sequence[Mapping[str, Any]], *, nodes: Sequence[str], inside_gb_s: float, between_gb_s: float, error: str
) -> dict[str, str]:
    """Nodes whose all-reduces are too slow or did not end.

    Args:
        lines: output of slurm/bandwidth.py.
        nodes: of the job.
        inside_gb_s: minimum among a node's ranks [GB/s]; 0: none.
        between_gb_s: minimum among the ranks of two neighbours [GB/s]; 0: none.
        error: its other output, if it failed.
    """
    if any("all" in line for line in lines) or (len(nodes) == 1 and not error):
        error = ""
    inside = {line["node"]: float(line.get("inside", math.inf)) for line in lines if "node" in line}
    between: dict[str, float] = {}
    for line in lines:
        for node in line.get("pair", ()):
            between[node] = max(between.get(node, 0.0), float(line["between"]))
    found = {}
    for node in nodes:
        if error and node not in inside:
            found[node] = f"all_reduce: nothing from its ranks: {error}"
        elif inside.get(node, math.inf) < inside_gb_s:
            found[node] = f"all_reduce: {inside[node]:.2f} GB/s between its ranks, wants {inside_gb_s:g}"
        elif error and len(nodes) > 1 and node not in between:
            found[node] = f"all_reduce: nothing with its neighbours: {error}"
        elif between.get(node, math.inf) < between_gb_s:
            found[node] = f"all_reduce: {between[node]:.2f} GB/s with its neighbours, wants {between_gb_s:g}"
    if error and not found:  # each node works with its neighbours
        found = dict.fromkeys(nodes, f"all_reduce: nothing over all ranks: {error}")
    return found


def _command(record: Record, profile: Profile) -> list[str]:
    wanted = profile.preflight
    program = ["-m", "slurm.preflight", record.run, f"--gpus={profile.gpus_per_node}"]
    program += [f"--disk-gb={wanted.disk_gb:g}", f"--shared-memory-gb={wanted.shared_memory_gb:g}"]
    program += [f"--skip={name}" for name in wanted.skip]
    # A failing check must not end the others.
    return _srun(record, profile, program, tasks=1, kill_on_bad_exit=False)


def _srun(
    record: Record, profile: Profile, program: Sequence[str], *, tasks: int, kill_on_bad_exit: bool = True
) -> list[str]:
    """A step with some tasks of Python on each node of the job."""
    command = ["srun", f"--nodes={record.nodes}", f"--ntasks={record.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    command += [f"--cpus-per-task={profile.cpus_per_task}", "--mpi=none", "--export=ALL"]
    command += [f"--kill-on-bad-exit={int(kill_on_bad_exit)}"]
    return [*command, *container.task(record, profile, program)]


@dataclass(frozen=True)
class _Output:
    """The output of a step.

    Attributes:
        lines: JSON objects.
        error: the last line of its other output; "" if it ended well.
        late: it did not end in time.
        said: all of its other output.
    """

    lines: list[dict[str, Any]]
    error: str
    late: bool
    said: str = ""

    def show(self) -> None:
        """Print the whole output of a failed step, because the cause is seldom in its last line."""
        if self.error and self.said:
            sys.stderr.write(f"{self.said.rstrip()}\n")


def _output(
    command: Sequence[str],
    record: Record,
    environment: dict[str, str],
    *,
    timeout_s: float,
    patience_s: float,
    stopping: Callable[[], bool],
) -> _Output:
    """The output of a step. A step that slurmctld could not start, because it was down, has no result about nodes."""

    def step() -> _Output:
        found = _once(command, record, environment, timeout_s=timeout_s)
        if not found.lines and scheduler.no_answer(found.error):
            raise scheduler.UnreachableError(f"SLURM does not answer: {found.error}")
        return found

    return scheduler.with_retries(step, patience_s=patience_s, give_up=stopping)


def _once(command: Sequence[str], record: Record, environment: dict[str, str], *, timeout_s: float) -> _Output:
    late, errors = False, ""
    try:
        ended = subprocess.run(
            command,
            env=environment,
            cwd=record.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        said, errors = ended.stdout, ended.stderr.strip()
        error = "" if ended.returncode == 0 else _main_error(errors) if errors else f"status {ended.returncode}"
    except subprocess.TimeoutExpired as cut_off:
        late = True
        said, errors = ((part or b"").decode(errors="replace") for part in (cut_off.stdout, cut_off.stderr))
        error = f"nothing within {timeout_s:g} s"
    return _Output(list(_objects(said)), error, late, errors)


def _objects(said: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in an output; other lines come from the node's software."""
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            found = bounded.parse_json(line)
            if isinstance(found, dict):
                yield found


def _main_error(text: str) -> str:
    """The line with the cause of a failed step.

    In order of preference: slurmctld was down; an error of a container runtime; the last line that is not srun's report
    on ended tasks.
    """
    lines = text.splitlines()
    telling = [line for line in lines if not _REPORT.match(line)]
    for belongs in (scheduler.no_answer, _RUNTIME_ERROR.search, bool):
        if found := next((line for line in reversed(telling) if belongs(line)), ""):
            return found
    return lines[-1]


def of_the_job(bad: Mapping[str, UnfitNode], *, nodes: int) -> dict[str, str]:
    """Bad nodes that must not be cordoned, and why: the job, or something the nodes share, causes the problem.

    Args:
        bad: nodes with a problem.
        nodes: of the job.
    """
    if nodes > 1 and len(bad) == nodes:
        return dict.fromkeys(bad, "all nodes of the job have a problem")
    causes = [cordon_file.cause(one.text) for one in bad.values() if not one.hardware]
    found = {}
    for node, one in bad.items():
        if not one.hardware and causes.count(cordon_file.cause(one.text)) > 1:
            found[node] = "several nodes have the same problem"
        elif not one.cordon:
            found[node] = "a job of one node cannot tell whether others have it too"
    return found


def at_fault(record: Record, profile: Profile, bad: Mapping[str, UnfitNode]) -> list[str]:
    """Bad nodes with a fault of their own: a job without them would not have the problem."""
    spared = of_the_job(bad, nodes=record.nodes)
    return [
        node
        for node, one in sorted(bad.items())
        if node not in spared and (one.hardware or not _others_with(record, profile, node, one.text))
    ]


def refusal(record: Record, profile: Profile, bad: Mapping[str, UnfitNode]) -> LaunchError:
    """The error that ends the job before ranks start. Cordons the bad nodes that are at fault themselves."""
    spared = of_the_job(bad, nodes=record.nodes)
    cordon(
        record,
        profile,
        {node: one.text for node, one in sorted(bad.items()) if node not in spared},
        hardware=[node for node, one in bad.items() if one.hardware],
    )
    lines = [f"node {node} is not fit to train on: {one.text}" for node, one in sorted(bad.items())]
    lines += [f"{node} is not cordoned: {why}" for node, why in sorted(spared.items())]
    return LaunchError(
        "; ".join(lines),
        remedy=f"{shell_command('resume', record.run)} leaves nodes of {profile.cordon_file or 'a cordon file'} out; "
        f"by hand: #SBATCH --exclude={','.join(sorted(bad))}; a check is turned off by preflight.skip of the profile",
    )


def _others_with(record: Record, profile: Profile, node: str, text: str) -> list[str]:
    """Nodes in the cordon file with the same problem."""
    if profile.cordon_file is None:
        return []
    entries = cordon_file.entries(Path(record.cwd) / profile.cordon_file, max_age_s=profile.cordon_expires)
    cause = cordon_file.cause(text)
    return [entry.node for entry in entries if cordon_file.cause(entry.reason) == cause and entry.node != node]


def cordon(
    record: Record, profile: Profile, bad: Mapping[str, str], *, reason: str = "", hardware: Container[str] = ()
) -> dict[str, str]:
    """Add nodes to the profile's cordon file; returns the new ones with their problems.

    A node is not added if another node is already there with the same problem: then the jobs are the likely cause.

    Args:
        record: of the launch.
        profile: of the cluster.
        bad: nodes, with the problem of each.
        reason: text instead of the problem, for nodes that SLURM lost.
        hardware: nodes whose devices are at fault, which may be true of several nodes.
    """
    if profile.cordon_file is None:
        return {}
    file = Path(record.cwd) / profile.cordon_file
    new = {}
    for node, text in bad.items():
        same = _others_with(record, profile, node, text)
        if same and not reason and not hardware:
            sys.stderr.write(
                f"node {node} ({text}): not written into {file}, because {', '.join(same)} is there for the same: "
                "probably no node is at fault; take the line out\n"
            )
            continue
        if cordon_file.add(file, [node], reason=reason or text, max_age_s=profile.cordon_expires):
            new[node] = text
            sys.stderr.write(f"node {node} ({text}): written into {file}, and left out of later launches\n")
    return new
