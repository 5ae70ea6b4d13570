"""Fixtures of the launcher's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch import scheduler


@pytest.fixture(autouse=True)
def cluster_asked_anew() -> Iterator[None]:
    """The name of the cluster is kept for the life of a process: no test may see another one's."""
    scheduler.cluster_name.cache_clear()
    yield
    scheduler.cluster_name.cache_clear()
