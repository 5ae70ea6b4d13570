# Nodes of a job: examined before its ranks start, and written into the cordon file if they are not fit or were lost.
# What is examined is slurm/preflight.py's; what follows for the job is job.py's.
"""Fit and unfit nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

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
    try:
        ended = subprocess.run(
            _command(record, profile),
            cwd=record.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        said, errors = ended.stdout, ended.stderr.strip()
    except subprocess.TimeoutExpired as error:
        said, errors = (error.stdout or b"").decode(errors="replace"), f"nothing within {_TIMEOUT_S:g} s"
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found = {one["node"]: [f"{name}: {text}" for name, text in one["problems"].items()] for one in answers}
    if "clock" not in profile.preflight.skip:
        for node, text in clock_problems(answers, within_s=time.monotonic() - began).items():
            found[node].append(f"clock: {text}")
    if interrupted():
        return {}
    for node in expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", "")):
        found.setdefault(node, [f"no answer: {errors.splitlines()[-1] if errors else 'it ended silently'}"])
    for node, problems in sorted(found.items()):
        sys.stderr.write(f"node {node}: {'; '.join(problems) or 'ready'}\n")
    return {node: "; ".join(problems) for node, problems in found.items() if problems}


def _command(record: Record, profile: Profile) -> list[str]:
    wanted = profile.preflight
    command = ["srun", f"--nodes={record.nodes}", f"--ntasks={record.nodes}", "--ntasks-per-node=1", "--mpi=none"]
    command += ["--export=ALL", *profile.srun_arguments]
    command += [record.python, "-m", "slurm.preflight", record.run, f"--gpus={profile.gpus_per_node}"]
    command += [f"--disk-gb={wanted.disk_gb:g}", f"--shared-memory-gb={wanted.shared_memory_gb:g}"]
    return [*command, *(f"--skip={name}" for name in wanted.skip)]


def cordon(record: Record, profile: Profile, bad: Mapping[str, str], *, reason: str = "") -> dict[str, str]:
    """Write nodes into the profile's cordon file; those that are new there, with what is wrong."""
    if profile.cordon_file is None:
        return {}
    file = Path(record.cwd) / profile.cordon_file
    new = {node: text for node, text in bad.items() if cordon_file.add(file, [node], reason=reason or text)}
    for node, text in new.items():
        sys.stderr.write(f"node {node} ({text}): written into {file}, and left out of later launches\n")
    return new
