"""Fixtures: a small data set, and every order of its documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmscale.data.prepared import table_facts
from mmscale.data.stream import packing_cache
from mmscale.tables.settings import DATA_ORDERS
from tests.unit.data.corpora import corpus, prepare
from tests.unit.data.stream.mixtures import DOCUMENTS, OPTIONS, SMALL_BLOCKS


@pytest.fixture(autouse=True, scope="module")
def _small_packings() -> Iterator[None]:
    """A packing holds a few epochs of these sets; of 65,536 documents it would hold hundreds, of which one is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_cache, "_BLOCK_DOCUMENTS", 256)
        yield


@pytest.fixture(params=list(DATA_ORDERS))
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each order in turn, with blocks of few documents and tables that stay in their files."""
    if request.param != "epochs":
        monkeypatch.setitem(DATA_ORDERS, "blocks", SMALL_BLOCKS)
        monkeypatch.setattr(table_facts, "LARGE", SMALL_BLOCKS.above)
    monkeypatch.setitem(OPTIONS, "order", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return corpus(DOCUMENTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]) -> Path:
    return prepare(tmp_path_factory.mktemp("data") / "set", documents, parts=3)
