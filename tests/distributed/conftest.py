"""Fixtures of the distributed tests."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import References


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Traces of one process."""
    return References(tmp_path_factory.mktemp("references"))
