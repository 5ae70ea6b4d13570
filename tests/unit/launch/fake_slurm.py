# Commands of SLURM that answer from a table, for tests of what follows from the answers; tests/slurm asks a real one.
"""A SLURM of files."""

from __future__ import annotations

from pathlib import Path

from launch.job_table import _COLUMNS
from launch.scheduler import JobState

_AWAY = "Unable to contact slurm controller (connect failure)"


class FakeSlurm:
    """squeue, scontrol, scancel and sacct in a folder of their own, each of which notes how it was called.

    Args:
        folder: is made; belongs on PATH.
        jobs: what squeue says, by number.
    """

    def __init__(self, folder: Path, **jobs: JobState) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.sacct("")
        self.answer("scontrol", 'echo "ClusterName = here"')
        self.answer("scancel", "true")
        self.jobs(**jobs)

    def jobs(self, **jobs: JobState) -> None:
        """Change what squeue says."""
        self.answer("squeue", "".join(f"echo '{_line(number, state)}'\n" for number, state in jobs.items()) or "true")

    def away(self) -> None:
        """slurmctld does not answer any more."""
        for name in ("squeue", "scontrol", "scancel"):
            self.answer(name, f'echo "{name}: error: {_AWAY}" >&2; exit 1')

    def sacct(self, *lines: str) -> None:
        """What the accounting knows."""
        self.answer("sacct", "".join(f"echo '{line}'\n" for line in lines) or "true")

    def calls(self, name: str) -> list[str]:
        """Arguments of each call of a command."""
        file = self.folder / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def open_to_all(self) -> None:
        """Let other users call the commands."""
        for file in self.folder.iterdir():
            file.chmod(0o777)
        for name in ("squeue", "sacct", "scontrol", "scancel", "sinfo"):
            (self.folder / f"{name}.calls").touch(0o666)
            (self.folder / f"{name}.calls").chmod(0o666)

    def answer(self, name: str, script: str) -> None:
        """Have a command run some lines of bash."""
        file = self.folder / name
        file.write_text(f'#!/bin/bash\necho "$@" >> {file}.calls\n{script}\n')
        file.chmod(0o755)


def _line(number: str, state: JobState) -> str:
    values = {
        "JobArrayID": number,
        "JobID": state.id,
        "State": state.state,
        "Reason": state.reason or "None",
        "RestartCnt": str(state.restarts),
        "exit_code": str(state.exit.status << 8 | state.exit.signal),
        "StartTime": state.start or "N/A",
        "SubmitTime": state.submitted,
        "PreemptTime": "N/A",
        "Name": state.name,
        "NodeList": state.nodes,
    }
    return "".join(values[name].ljust(width) for name, width in _COLUMNS.items())
