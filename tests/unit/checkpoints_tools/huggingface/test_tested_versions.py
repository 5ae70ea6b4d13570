"""Exports say which versions of transformers they were tested with, and warn about others at load."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from checkpoints_tools.huggingface.export_settings import settings
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.shipped import versions_moma
from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from tests.end_to_end.running import ROOT
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported
from tests.unit.checkpoints_tools.huggingface.test_transformers_versions import VERSIONS

SIZES: dict[str, Any] = {"auxiliary_size": 5, "thresholds": True, "routing": "causal", "tokens_per_image": 4}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the shipped code says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers_logging.get_logger(versions_moma.__name__)
    logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("5.7.3", True),
        (OLDEST, False),
        ("5.8.7", False),
        ("5.17.0.dev0", False),
        (NEWEST, False),
        ("5.24.9", False),
        ("5.25.0", True),
        ("6.0.0rc1", True),
        ("4.57.1", True),
    ],
)
def test_other_versions_are_warned_about(
    version: str, warned: bool, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", version)  # as imported now: it replaces its own module
    for _ in range(2):
        exported(MODELS["moma"])
    if not warned:
        assert warnings == []
        return
    (said,) = warnings
    assert "tested with transformers 5.8 to 5.24" in said and version in said and "use_cache=False" in said


def test_one_range_everywhere() -> None:
    """The shipped code, the requirement, the pinned version, config.json and what `make test-all` installs."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hf"]
    assert required == ["huggingface-hub", f"transformers>={OLDEST.removesuffix('.0')}"]
    assert re.search(rf"^transformers=={re.escape(NEWEST)}$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert (next(iter(VERSIONS)), list(VERSIONS)[-1]) == (OLDEST, NEWEST)
    held = settings(MODELS["moma"], {"text_tokenizer": "a", "image_tokenizer": "b"})["mmscale"]
    assert held["tested_transformers"] == {"oldest": OLDEST, "newest": NEWEST}


@pytest.mark.parametrize("entry", sorted(set(model_config(MODELS["moma"], **SIZES)["auto_map"].values())))
def test_entries_import_all_they_need_themselves(entry: str) -> None:
    """transformers 5.8 copies a file of auto_map with its own relative imports, and not with those of the imported."""
    folder = Path(versions_moma.__file__).parent

    def imported(name: str) -> set[str]:
        return set(re.findall(r"^from \.(\w+) import", (folder / f"{name}.py").read_text(), re.MULTILINE))

    direct = imported(entry.partition(".")[0])
    assert {further for name in direct for further in imported(name)} <= direct
