# tests/unit/data/golden/built_in_digits/config.yaml: settings of a run on the digits when they were in the package.
"""Settings of data sets that are not part of the package any more: old files load, and new ones do not contain them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.config.changes import changes
from mmscale.config.data.schema import FORMER_PREPARE
from mmscale.config.load import dump, load, resolve
from mmscale.errors import ConfigError

FILE = Path(__file__).parents[1] / "data" / "golden" / "built_in_digits" / "config.yaml"
OLD: dict[str, Any] = yaml.safe_load(FILE.read_text())
DOCUMENTS = {"source": "documents", "documents": ["a.jsonl"]}


def with_prepare(**prepare: Any) -> dict[str, Any]:
    return OLD | {"data": OLD["data"] | {"prepare": OLD["data"]["prepare"] | prepare}}


@pytest.mark.parametrize(
    "prepare",
    [{}, {"augment": 8}, {"source": "emoji", "emoji": {"languages": ["en", "de"]}}, DOCUMENTS],
    ids=["digits", "augmented", "emoji", "documents, with their defaults"],
)
def test_an_old_file_loads_and_no_change_is_seen(prepare: dict[str, Any]) -> None:
    old = with_prepare(**prepare)
    config = resolve(old)
    assert load(FILE).data.prepare is not None
    assert config.data.prepare is not None and config.data.prepare.source == old["data"]["prepare"]["source"]
    assert not set(FORMER_PREPARE) & set(yaml.safe_load(dump(config))["data"]["prepare"])
    assert resolve(yaml.safe_load(dump(config))) == config
    found = [change for change in changes(old, config) if change.key.startswith("data.prepare")]
    assert found == []


@pytest.mark.parametrize(
    "override", ["data.prepare.augment=8", "data.prepare.emoji.languages=[en, de]", "data.prepare.emoji={limit: 5}"]
)
def test_what_would_change_other_documents_is_refused(override: str) -> None:
    """Not ignored: a script that asks for eight copies would get the four of the files."""
    new = with_prepare(**DOCUMENTS)
    for key in FORMER_PREPARE:
        del new["data"]["prepare"][key]
    with pytest.raises(ConfigError, match=r"data\.prepare\.(augment|emoji) is not a setting"):
        resolve(new, [override])
