"""Tests that need a GPU: skipped with a reason if there is none. They run in this process, on the first device.

`python -m pytest tests/gpu` on a machine with a GPU; docs/gpu.md describes the case without a network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmscale.bench import gpu_checks
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import FULL
from mmscale.runtime import device, groups, stopwatch, transformer_engine
from mmscale.runtime.rank_env import RankEnv

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = transformer_engine.problem()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not device.has_cuda():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
        elif "needs_te" in item.keywords and missing is not None:
            item.add_marker(pytest.mark.skip(reason=f"Transformer-Engine: {missing}"))


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A world of one process for all tests: a CUDA context does not survive a fork."""
    groups.initialize(RankEnv(), seed=1234)
    stopwatch.full_precision()
    yield
    groups.finalize()


@pytest.fixture
def session(one_rank: None) -> Session:
    """Sizes and record of the benchmark, whose checks these tests make."""
    return Session(FULL, repeats=3, deadline=time.monotonic() + 600)


@pytest.fixture(scope="session")
def begun(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> gpu_checks.Begun:
    """A run of the torch backend from which others continue."""
    session = Session(FULL, repeats=1, deadline=time.monotonic() + 600)
    return gpu_checks.begin(session, tmp_path_factory.mktemp("begun"))
