# Nodes of a job: examined before its ranks start, and written into the cordon file if they are not fit or were lost.
# What is examined is slurm/preflight.py's and slurm/bandwidth.py's; what follows for the job is job.py's.
"""Fit and unfit nodes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import cordon as cordon_file
from launch.profile import Profile
from launch.record import Record
from mmscale.runtime.rank_env import expand_hostlist
from slurm.preflight import clock_problems

_TIMEOUT_S = 180.0


def examine(record: Record, profile: Profile, *, interrupted: Callable[[], bool]) -> dict[str, str]:
    """Ask every node of this job.

    Args:
        record: of the launch.
        profile: of the cluster: what a node has to offer, and what is not asked.
        interrupted: whether this process was asked to end: a check that SLURM ended says nothing about nodes.

    Returns:
        Nodes with a problem, and what it is.
    """
    began = time.monotonic()
    answers, error = _output(_command(record, profile), record, dict(os.environ))
    found = {one["node"]: [f"{name}: {text}" for name, text in one["problems"].items()] for one in answers}
    if "clock" not in profile.preflight.skip:
        for node, text in clock_problems(answers, within_s=time.monotonic() - began).items():
            found[node].append(f"clock: {text}")
    if interrupted():
        return {}
    for node in expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", "")):
        found.setdefault(node, [f"no answer: {error or 'it ended silently'}"])
    for node, problems in sorted(found.items()):
        sys.stderr.write(f"node {node}: {'; '.join(problems) or 'ready'}\n")
    return {node: "; ".join(problems) for node, problems in found.items() if problems}


def measure(
    record: Record, profile: Profile, *, port: int, interrupted: Callable[[], bool]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Measure all-reduces inside the nodes of this job and between them.

    Args:
        record: of the launch.
        profile: of the cluster: what has to be reached.
        port: of the rendezvous on the first node.
        interrupted: as for `examine`.

    Returns:
        Nodes with a problem, and what it is; and the bus bandwidths [GB/s] that were measured.
    """
    wanted = profile.preflight
    if "all_reduce" in wanted.skip or record.world_size == 1:
        return {}, {}
    environment = {**os.environ, "MMSCALE_LAUNCHER": "slurm", "MASTER_PORT": str(port)}
    command = _srun(record, profile, tasks=record.tasks_per_node)
    command += [record.python, "-m", "slurm.bandwidth", f"--mb={wanted.all_reduce_mb:g}"]
    lines, error = _output(command, record, environment)
    nodes = expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))
    bad = slow_nodes(
        lines,
        nodes=nodes,
        inside_gb_s=wanted.all_reduce_inside_gb_s if record.tasks_per_node > 1 else 0.0,
        between_gb_s=wanted.all_reduce_between_gb_s,
        error=error,
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
    return bad, measured


def slow_nodes(
    lines: Sequence[Mapping[str, Any]], *, nodes: Sequence[str], inside_gb_s: float, between_gb_s: float, error: str
) -> dict[str, str]:
    """Nodes whose all-reduces are too slow, or never came to an end.

    Args:
        lines: what slurm/bandwidth.py printed.
        nodes: of the job.
        inside_gb_s: what a node's ranks have to reach [GB/s]; 0: anything.
        between_gb_s: what they have to reach with those of a neighbour [GB/s]; 0: anything.
        error: what it said besides, if it did not end well.
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
    if error and not found:  # each works with its neighbours
        found = dict.fromkeys(nodes, f"all_reduce: nothing over all ranks: {error}")
    return found


def _command(record: Record, profile: Profile) -> list[str]:
    wanted = profile.preflight
    command = _srun(record, profile, tasks=1)
    command += [record.python, "-m", "slurm.preflight", record.run, f"--gpus={profile.gpus_per_node}"]
    command += [f"--disk-gb={wanted.disk_gb:g}", f"--shared-memory-gb={wanted.shared_memory_gb:g}"]
    return [*command, *(f"--skip={name}" for name in wanted.skip)]


def _srun(record: Record, profile: Profile, *, tasks: int) -> list[str]:
    """A step with some tasks on each node of the job."""
    command = ["srun", f"--nodes={record.nodes}", f"--ntasks={record.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    command += [f"--cpus-per-task={profile.cpus_per_task}", "--mpi=none", "--export=ALL", "--kill-on-bad-exit=1"]
    return [*command, *profile.srun_arguments]


def _output(command: Sequence[str], record: Record, environment: dict[str, str]) -> tuple[list[dict[str, Any]], str]:
    """JSON objects that a step prints, and the last line of what it said besides; "" if it ended well."""
    try:
        ended = subprocess.run(
            command,
            env=environment,
            cwd=record.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        said, errors = ended.stdout, ended.stderr.strip()
        error = "" if ended.returncode == 0 else errors.splitlines()[-1] if errors else f"status {ended.returncode}"
    except subprocess.TimeoutExpired as late:
        said, error = (late.stdout or b"").decode(errors="replace"), f"nothing within {_TIMEOUT_S:g} s"
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")], error


def cordon(record: Record, profile: Profile, bad: Mapping[str, str], *, reason: str = "") -> dict[str, str]:
    """Write nodes into the profile's cordon file; those that are new there, with what is wrong."""
    if profile.cordon_file is None:
        return {}
    file = Path(record.cwd) / profile.cordon_file
    new = {node: text for node, text in bad.items() if cordon_file.add(file, [node], reason=reason or text)}
    for node, text in new.items():
        sys.stderr.write(f"node {node} ({text}): written into {file}, and left out of later launches\n")
    return new
