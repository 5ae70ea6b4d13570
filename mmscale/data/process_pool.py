"""Runs independent pieces of work in several processes of this machine. No torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mmscale.errors import DataError

_Done = TypeVar("_Done")


def map_in_processes(
    work: Callable[[Any], _Done], jobs: Sequence[Any], workers: int, *, begin: Callable[[int], None] | None = None
) -> Iterator[_Done]:
    """Results in the order of the jobs; computed in this process if there is only one worker or job.

    Args:
        work: a function that can be pickled.
        jobs: its arguments.
        workers: processes.
        begin: called in each of several processes before its first job, with the number of the process, from 0.

    Raises:
        DataError: a process was killed.
    """
    if min(workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    started = context.Value("i", 0)
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_begin, initargs=(begin, started)
    ) as pool:
        try:
            yield from pool.map(work, jobs)
        except BrokenProcessPool as error:
            raise DataError(
                "data: a worker process was killed, perhaps because memory ran out",
                remedy="run the command again with fewer --workers",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(begin: Callable[[int], None] | None, started: Any) -> None:
    """Number this process; `started`: processes of the pool so far, in shared memory."""
    with started.get_lock():
        number = started.value
        started.value += 1
    if begin is not None:
        begin(number)


def run_stages(stages: Sequence[Sequence[Callable[[], _Done]]], *, tasks: int) -> list[_Done]:
    """Call functions in several processes: those of a stage at the same time, after all of the stage before.

    Args:
        stages: functions that can be pickled.
        tasks: processes.

    Returns:
        The results of the last stage.

    Raises:
        DataError: a process was killed.
    """
    found: list[_Done] = []
    for stage in stages:
        found = list(map_in_processes(_call, stage, tasks))
    return found


def _call(work: Callable[[], _Done]) -> _Done:
    return work()
