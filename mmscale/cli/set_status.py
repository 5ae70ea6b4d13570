"""The state of a data set that jobs prepare.

`mmscale status SET`: data/prepared/shares.py has the finished parts, launch/job_table.py the jobs that are alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.job_table import JobTable


def state_of(folder: Path, table: JobTable) -> dict[str, Any] | None:
    """The progress of the jobs of a data set; None: the folder is not a set that jobs prepare.

    A failed job writes no manifest, so the state becomes `failed` when none of the jobs is left.

    Args:
        folder: of the set, or any other folder.
        table: SLURM's answers.

    Returns:
        `folder`, `state` (submitting, preparing, prepared, failed), `reason` (may be ""), `parts`, `done`, `jobs`,
        `logs` (their folder) and `ended` (no job works on it any more).
    """
    if not (folder / "plan.json").is_file():  # before the import, which takes a second
        return None
    from mmscale.data.prepared.folder import JOBS
    from mmscale.data.prepared.shares import preparation_status

    found = preparation_status(folder)
    if found is None:
        return None
    found |= {"logs": str(folder / JOBS), "ended": found["state"] in ("prepared", "failed")}
    return found | _by_jobs(found["jobs"], table) if found["state"] == "preparing" else found


def _by_jobs(jobs: list[str], table: JobTable) -> dict[str, Any]:
    """The state of a set without a manifest, from SLURM's states of its jobs."""
    from launch.scheduler import UnreachableError

    try:
        states = table.states(jobs)
    except UnreachableError as error:
        return {"reason": error.cause}
    if any(not state.ended for state in states.values()):
        return {}
    last = states.get(jobs[-1])
    how = "SLURM does not know it any more" if last is None else f"it is {last.state} ({last.exit})"
    why = f"no job runs or waits, and job {jobs[-1]}, which was to finish, has not: {how}"
    return {"state": "failed", "ended": True, "reason": f"{why}; run `mmscale data prepare` again to continue"}
