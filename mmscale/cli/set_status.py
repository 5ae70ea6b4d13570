"""The state of a data set that jobs prepare or deduplicate.

`mmscale status SET`: data/prepared/shares.py and data/dedup/submitted.py have what is finished, launch/job_table.py the
jobs that are alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.job_table import JobTable

DATA_SET = "data set"  # value of `kind`
# Files of records, as in data/prepared/folder.py and data/dedup/submitted.py, whose import takes a second.
_PLAN, _DEDUP = "plan.json", ".cache/dedup/submitted.json"
# States while jobs are expected, and the commands that go on.
_WORKING = {"preparing": "`mmscale data prepare`", "deduplicating": "`mmscale data dedup`"}


def state_of(folder: Path, table: JobTable) -> dict[str, Any] | None:
    """The progress of the jobs of a data set; None: the folder is not a set of which jobs do work.

    A failed job writes no manifest and no weights, so the state becomes `failed` when none of the jobs is left. A set
    that jobs have prepared and others deduplicate has the state of the latter.

    Args:
        folder: of the set, or any other folder.
        table: SLURM's answers.

    Returns:
        `kind`, `folder`, `state` (submitting, preparing, prepared, deduplicating, deduplicated, failed), `reason` (may
        be ""), `jobs`, `logs` (their folder), `ended` (no job works on it any more); `parts` and `done` of a
        preparation; `slices`, `read` (of them) and `compared` (ranges of keys) of a deduplication.
    """
    found = None
    if (folder / _PLAN).is_file():
        found = _preparation(folder)
    if (found is None or found["state"] == "prepared") and (folder / _DEDUP).is_file():
        from mmscale.data.dedup.submitted import dedup_status

        found = dedup_status(folder) or found
    if found is None:
        return None
    found = {"kind": DATA_SET, "ended": found["state"] in ("prepared", "deduplicated", "failed")} | found
    return found | _by_jobs(found, table) if found["state"] in _WORKING else found


def _preparation(folder: Path) -> dict[str, Any] | None:
    from mmscale.data.prepared.folder import JOBS
    from mmscale.data.prepared.shares import preparation_status

    found = preparation_status(folder)
    return None if found is None else found | {"logs": str(folder / JOBS)}


def _by_jobs(found: dict[str, Any], table: JobTable) -> dict[str, Any]:
    """The state of a set whose jobs have not finished, from SLURM's states of them."""
    from launch.scheduler import UnreachableError

    jobs = found["jobs"]
    try:
        states = table.states(jobs)
    except UnreachableError as error:
        return {"reason": error.cause}
    if any(not state.ended for state in states.values()):
        return {}
    last = states.get(jobs[-1])
    how = "SLURM does not know it any more" if last is None else f"it is {last.state} ({last.exit})"
    why = f"no job runs or waits, and job {jobs[-1]}, which was to finish, has not: {how}"
    again = _WORKING[found["state"]]
    return {"state": "failed", "ended": True, "reason": f"{why}; run {again} again to continue"}


def shown(one: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table about a state."""
    made = one["state"]
    if "parts" in one:
        made += f", {one['done']} of {one['parts']} parts"
    elif one["state"] == "deduplicating":
        made += f", {one['read']} of {one['slices']} slices read, {one['compared']} ranges of keys compared"
    why = [("reason", one["reason"]), ("logs", one["logs"])] if one["reason"] else []
    return [("data set", one["folder"]), ("state", made), ("jobs", ", ".join(one["jobs"])), *why]
