"""Runs the Python code of tests/gpu and `mmscale bench gpu` with a torch that reports a GPU, with sizes for a CPU.

Nothing waits for a device here, so tests that count waits find none; only the execution of their steps is tested. Code
that times streams or captures graphs is not included (tests/gpu/test_gpu_step.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch.profiler import profile

from mmscale.bench import gpu, gpu_checks, operators
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import TINY
from mmscale.runtime import groups, stopwatch, transformer_engine
from mmscale.runtime.rank_env import RankEnv
from tests.gpu.test_gpu_correctness import *  # noqa: F403  its tests, with the fixtures below
from tests.gpu.test_gpu_step import test_a_step_waits_once, test_forward_and_backward_do_not_wait  # noqa: F401


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    groups.initialize(RankEnv(), seed=1234)
    stopwatch.full_precision()
    yield
    groups.finalize()


@pytest.fixture
def session(one_rank: None) -> Session:
    return Session(replace(TINY), repeats=1, deadline=time.monotonic() + 3600)


@pytest.fixture(scope="session")
def begun(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> gpu_checks.Begun:
    session = Session(replace(TINY), repeats=1, deadline=time.monotonic() + 3600)
    return gpu_checks.begin(session, tmp_path_factory.mktemp("begun"))


@pytest.mark.parametrize("part", [1, 2])
def test_every_row_of_the_benchmark(one_rank: None, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without CUDA torch's profiler would print a backtrace for every requested kernel.
    monkeypatch.setattr(operators, "_torch_profile", lambda activities: profile(activities=activities[:1]))
    assert transformer_engine.problem() is None
    result = gpu.run(part=part, device="cuda", tiny=True, repeats=1, steps=20, seconds=1800)
    assert [row["name"] + ": " + row["note"] for row in result["rows"] if row["ms"] is None] == []
    assert {check["name"]: check["note"] for check in result["checks"] if not check["passed"]} == {}
