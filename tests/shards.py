# A test is in the same shard whatever else is selected.
"""A plugin of pytest that runs one part of the selected tests: every test is in exactly one of N shards.

    python -m pytest -p tests.shards --shard 3/12 -m exhaustive tests/distributed

The first number may be any whole number; shards repeat after N. `.ci/run` passes the number of commits, so that each
commit runs another shard.
"""

from __future__ import annotations

import hashlib
import re

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=_shard, default=(0, 1), metavar="K/N", help="run one of N parts of the tests")


def _shard(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if numbers is None:
        raise pytest.UsageError(f"--shard is K/N, for example 3/12, not '{text}'")
    return int(numbers[1]), int(numbers[2])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, shards = config.getoption("--shard")
    rest = [item for item in items if not in_shard(item.nodeid, number, shards)]
    if rest:
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if in_shard(item.nodeid, number, shards)]


def in_shard(name: str, number: int, shards: int) -> bool:
    """Whether a test runs in a shard.

    Args:
        name: the test's id.
        number: of the shard, counted modulo `shards`.
        shards: how many there are.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % shards == number % shards
