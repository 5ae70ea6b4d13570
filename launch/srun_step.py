"""One srun step of ranks.

One start of ranks by srun (or by the local launcher): the process, srun's own output, and the interpretation of its
end. job.py decides when to start ranks and what follows.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import scheduler

LAUNCHER_LOG = "launcher.log"  # next to the ranks' logs: srun's output about the step
_OUT_OF_MEMORY = re.compile(r"Out Of Memory|oom[-_ ]?kill", re.IGNORECASE)
_TASK = re.compile(r"error: (\S+): tasks? ([\d,-]+): Out Of Memory")
# Messages of pyxis and of apptainer when a container cannot start.
_NO_CONTAINER = re.compile(r"pyxis: .*(\[ERROR\].*)|^(FATAL: .*)", re.MULTILINE)
_TAIL = 20_000  # bytes of a rank's log


def start(
    command: Sequence[str], environment: Mapping[str, str], *, cwd: str, logs: Path, slurm: bool
) -> subprocess.Popen[bytes]:
    """Start ranks in a session of their own, so that signals to this process's group do not reach srun.

    Args:
        command: of srun or of the local launcher.
        environment: of the ranks.
        cwd: working directory.
        logs: folder of the ranks' output.
        slurm: the command is srun, whose own output goes to a file; local ranks print to this process's output.
    """
    if not slurm:
        return subprocess.Popen(command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, start_new_session=True)
    with (logs / LAUNCHER_LOG).open("ab") as output:
        return subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stderr=output, start_new_session=True
        )


def report(logs: Path) -> str:
    """The output of srun, also written to this process's standard error."""
    try:
        said = (logs / LAUNCHER_LOG).read_text(errors="replace")
    except OSError:
        return ""
    sys.stderr.write(said)
    return said


def never_began(logs: Path, said: str) -> bool:
    """Whether srun could not start the ranks because slurmctld did not answer, which does not count as a crash."""
    return scheduler.no_answer(said) and not any(logs.glob("rank_*.log")) and not any(logs.glob("agent_*.log"))


def cause_of(logs: Path, said: str) -> str:
    """The cause of a crash, as far as SLURM reports it: out of memory, or a container. "" if unknown."""
    if killed := _TASK.findall(said):
        return "out of memory: " + ", ".join(f"rank {tasks} on {node}" for node, tasks in killed)
    if _OUT_OF_MEMORY.search(said):
        return "out of memory"
    for file in sorted(logs.glob("rank_*.log")):
        if re.search(rb"slurmstepd: error: Detected \d+ oom[-_]kill", _tail(file)):
            return f"out of memory: {file.stem.replace('_', ' ')}"
    for text in (said, *(_tail(file).decode(errors="replace") for file in sorted(logs.glob("*_0.log")))):
        if found := _NO_CONTAINER.search(text):
            return f"container: {(found[1] or found[2]).strip()}"
    return ""


def _tail(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - _TAIL))
            return opened.read()
    except OSError:
        return b""
