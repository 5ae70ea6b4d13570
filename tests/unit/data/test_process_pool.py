"""Processes of a pool: results in order, and a number for each process."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

import pytest

from mmscale.data.process_pool import map_in_processes

_NUMBER = "MMSCALE_TEST_NUMBER"


def _begin(folder: Path, number: int) -> None:
    os.environ[_NUMBER] = str(number)
    (folder / str(number)).touch()


def _work(folder: Path, workers: int, job: int) -> tuple[int, str, int]:
    while len(list(folder.iterdir())) < workers:  # so that every process gets a job
        time.sleep(0.01)
    return job, os.environ[_NUMBER], os.getpid()


@pytest.mark.parametrize(("workers", "jobs"), [(2, 5), (3, 3)])
def test_each_process_has_a_number_of_its_own(workers: int, jobs: int, tmp_path: Path) -> None:
    work = functools.partial(_work, tmp_path, workers)
    found = list(map_in_processes(work, range(jobs), workers, begin=functools.partial(_begin, tmp_path)))
    assert [job for job, _, _ in found] == list(range(jobs))
    numbers = {pid: number for _, number, pid in found}
    assert len(set(numbers.values())) == len(numbers)
    assert set(numbers.values()) <= set(map(str, range(workers)))
    assert os.getpid() not in numbers
