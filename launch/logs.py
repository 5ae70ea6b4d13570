"""Log files of a run.

`mmscale logs`: the output of a rank, or of its job, so far and from now on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from launch import chain, owner, status
from launch import record as records
from launch.job_table import JobTable
from mmscale.errors import LaunchError

_POLL_S = 0.3


def lines(
    run: Path, *, rank: int = 0, attempt: int | None = None, follow: bool = False, job: bool = False
) -> Iterator[str]:
    """Text of a log, in pieces.

    Args:
        run: the run's folder.
        rank: whose log.
        attempt: which one; None: the newest that has the log, and with `follow` each later one.
        follow: continue until the run has ended.
        job: the output of the job instead of a rank's.

    Raises:
        LaunchError: there is no such log.
    """
    if not follow:
        records.check_folder(run)
    file = _file(run, rank=rank, attempt=attempt, job=job)
    if file is None and not follow:
        raise LaunchError(
            f"{run} has no log of {'its job' if job else f'rank {rank}'}{_described_attempts(run)}",
            remedy="" if owner.starting(run) is None else "--follow waits until its ranks have loaded torch",
        )
    place, table = 0, JobTable()
    while True:
        ended = follow and status.ended(run, table)  # checked before reading, so that output until then is printed
        newest = _file(run, rank=rank, attempt=attempt, job=job)
        if file is not None:
            text, place = _more(file, place)
            if text:
                yield text
        if newest != file:
            file, place = newest, 0
            if follow and newest is not None:
                yield f"--- {newest}\n"
            continue
        if not follow or ended:
            return
        time.sleep(_POLL_S)


def note(run: Path, *, rank: int) -> str:
    """A line for `lines` without an attempt: a newer attempt than the printed one is starting; "": none is."""
    held = owner.starting(run)
    file = None if held is None else _file(run, rank=rank, attempt=None, job=False)
    if held is None or file is None or file.parent.name == f"attempt_{held.attempt}":
        return ""
    return f"attempt {held.attempt} is starting and has printed nothing yet; above is {file}"


def _more(file: Path, place: int) -> tuple[str, int]:
    with file.open("rb") as opened:
        opened.seek(place)
        data = opened.read()
    return data.decode(errors="replace"), place + len(data)


def _file(run: Path, *, rank: int, attempt: int | None, job: bool) -> Path | None:
    if job:
        # A waiting chained job has no log; jobs of an array print into one folder.
        logs = (records.job_log(folder, key.id) for folder, key in reversed(chain.keys(run)))
        return next((log for log in logs if log is not None), None)
    # The newest folder may have no log: ranks that restart in place keep logging to the folder of the first start.
    attempts = [attempt] if attempt is not None else reversed(_attempts(run))
    files = (run / "logs" / f"attempt_{chosen}" / f"rank_{rank}.log" for chosen in attempts)
    return next((file for file in files if file.is_file()), None)


def _attempts(run: Path) -> list[int]:
    names = [re.fullmatch(r"attempt_(\d+)", entry.name) for entry in (run / "logs").glob("attempt_*")]
    return sorted(int(name[1]) for name in names if name)


def _described_attempts(run: Path) -> str:
    attempts = _attempts(run)
    if (held := owner.starting(run)) is not None:
        return f": attempt {held.attempt} is starting"
    if not attempts:
        return ": nothing has been started yet"
    names = sorted(entry.name for entry in (run / "logs" / f"attempt_{attempts[-1]}").glob("rank_*.log"))
    return f"; attempts {', '.join(map(str, attempts))}, the last with {', '.join(names) or 'no logs'}"
