"""Deduplication by several tasks that share a folder: a job array, or processes of this machine.

Two stages of tasks do the two passes of work.py, a last task does what killed tasks left undone and writes the
weights. The result is that of one process, byte for byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale.data.dedup.apply import SCRATCH, DedupRequest, checked_request, write_found
from mmscale.data.dedup.compared import SLICE
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.dedup.submitted import SubmittedDedup, read_submitted
from mmscale.data.dedup.work import DedupWork, compare_ranges, plan_work, ranges_of, read_pieces, unread
from mmscale.data.prepared.folder_lock import LOCK, write_error
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.progress import Reporter
from mmscale.errors import DataError

LOGS = "logs"  # folder of the jobs' logs
_PREFIX = "tasks-"

Task = Callable[[], Any]


@dataclass(frozen=True)
class ReadTask:
    """First pass over a block of documents."""

    work: DedupWork
    block: int
    workers: int

    def __call__(self) -> None:
        """Read the slices of the block that have not been read.

        Raises:
            DataError: the data set is damaged, or a process was killed.
        """
        if _there(self.work) and (pieces := unread(self.work, self.work.shares()[self.block])):
            read_pieces(self.work, pieces, self.work.held_out(), workers=self.workers, advance=lambda _: None)


@dataclass(frozen=True)
class CompareTask:
    """Second pass over every n-th range of keys."""

    work: DedupWork
    first: int
    step: int
    workers: int

    def __call__(self) -> None:
        """Compare the ranges that have not been compared. Errors as of `ReadTask`."""
        if not _there(self.work):
            return
        ranges = ranges_of(self.work)
        if ranges is None:
            sys.stderr.write("data dedup: tasks were killed before they had read their slices; the last task does it\n")
            return
        compare_ranges(self.work, ranges[self.first :: self.step], workers=self.workers, advance=lambda _: None)


@dataclass(frozen=True)
class FinishTask:
    """What the others left undone, clusters, and the weights."""

    work: DedupWork
    request: DedupRequest
    workers: int
    progress: bool = False

    def __call__(self) -> dict[str, Any]:
        """The findings, as of `apply.dedup`. Removes the temporary files if it succeeds.

        Raises:
            DataError: as `apply.dedup`, or the data set was prepared again meanwhile.
        """
        folder = self.work.folder
        if identity_of(folder, read_manifest(folder)) != self.request.of:
            raise DataError(
                f"data: {folder} has other documents than when the tasks began",
                remedy="run `mmscale data dedup` again",
            )
        with _locked(self.work.scratch):
            found = write_found(self.work, self.request, workers=self.workers, reporter=Reporter(enabled=self.progress))
            shutil.rmtree(self.work.scratch, ignore_errors=True)
        return found


@dataclass(frozen=True)
class SharedDedup:
    """A planned deduplication.

    Attributes:
        work: the inputs.
        request: what the command asks for.
    """

    work: DedupWork
    request: DedupRequest

    def stages(self, *, workers: int, progress: bool = False) -> list[list[Task]]:
        """Tasks; those of a stage are independent and start when all of the stage before have ended, in whatever way.

        Args:
            workers: processes of each task.
            progress: the last task reports on stderr.
        """
        count = len(self.work.blocks)
        reads: list[Task] = [ReadTask(self.work, block, workers) for block in range(count)]
        compares: list[Task] = [CompareTask(self.work, first, count, workers) for first in range(count)]
        return [reads, compares, [FinishTask(self.work, self.request, workers, progress)]]

    @property
    def logs(self) -> Path:
        """Folder of the jobs' logs."""
        return self.work.scratch.with_name(f"{self.work.scratch.name}-{LOGS}")

    def jobs(self) -> list[str]:
        """Jobs that an earlier command submitted for this data set, whatever it asked for; empty: none."""
        before = read_submitted(self.work.folder)
        return list(before.jobs) if before is not None else []

    def keep_jobs(self, jobs: Sequence[str] = (), *, refused: str = "") -> None:
        """Record the submitted jobs in the data set's folder, or why they could not be submitted."""
        work = self.work
        found = SubmittedDedup(str(work.scratch), str(self.logs), len(work.pieces), tuple(jobs), refused)
        found.write(work.folder)


def plan_tasks(
    folder: Path,
    *,
    rule: DuplicateRule,
    against: Sequence[Path] = (),
    held_out: bool = True,
    max_cluster: int | None = None,
    scratch: Path | None = None,
    tasks: int,
) -> SharedDedup:
    """Divide the work among tasks. The folder of temporary files depends on the request, so that another call goes on.

    Args:
        folder: as of `apply.dedup`, and so are the arguments that are not listed here.
        rule: likewise.
        against: likewise.
        held_out: likewise.
        max_cluster: likewise.
        scratch: on a file system that all tasks share.
        tasks: at most; there are not more than slices of 32,768 documents.

    Raises:
        DataError: a data set is missing or damaged, or the folder cannot be written.
    """
    folder = folder.resolve()
    others = [other.resolve() for other in against]
    request = checked_request(folder, against=others, held_out=held_out, max_cluster=max_cluster)
    content = json.dumps([request.of, request.described(), asdict(rule), tasks, SLICE])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    own = ((folder / SCRATCH) if scratch is None else scratch.resolve()) / f"{_PREFIX}{key}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        work = plan_work(folder, own, rule=rule, against=request.against, blocks=tasks)
    except OSError as error:
        raise write_error(error, own) from error
    return SharedDedup(work, request)


def _there(work: DedupWork) -> bool:
    """Whether the temporary files exist; a task may start after the last one has removed them."""
    if work.scratch.is_dir():
        return True
    sys.stderr.write(f"data dedup: {work.scratch} is gone, the work is done; this task does nothing\n")
    return False


@contextlib.contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Hold the folder of temporary files.

    Raises:
        DataError: another process finishes the same work.
    """
    with (scratch / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"data: another process finishes the work in {scratch}", remedy="wait for it to end"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
