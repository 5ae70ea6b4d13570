"""A run reads its prepared data once in the background, and ends if a file is not what was prepared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.data import digests
from mmscale.runs.events import read_events
from mmscale.train import data_check
from mmscale.train.data_check import Reader
from tests.end_to_end.lives import Life

SETTINGS = ("train.steps=30", "train.eval_every=30", "train.dry_run=false", "checkpoint.every=30")
SLOW = "*:*:step:slow=0.05"  # the data is read within a few steps; a save at the last one is too late for damage


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks have it too: on a busy machine a thread of the lowest priority may come to nothing in a second."""
    monkeypatch.setattr(data_check, "_LOWEST", 0)


def events(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"].startswith("data_")]


@pytest.mark.parametrize("mode", ["once", *(pytest.param(one, marks=pytest.mark.long) for one in ("node", "off"))])
def test_data_as_prepared(config: Path, digits: Path, tmp_path: Path, mode: str) -> None:
    life = Life(["train", str(config), f"run.dir={tmp_path}", *SETTINGS, f"data.verify={mode}"], faults=SLOW)
    assert set(life.end().values()) == {0}, life.said
    found = events(tmp_path / "tiny")
    if mode == "off":
        assert found == []
        return
    wanted = digests.read(digits) or {}
    (told,) = found
    assert told["event"] == "data_verified" and told["files"] == len(wanted) and told["seconds"] >= 0
    assert told["bytes"] == sum((digits / name).stat().st_size for name in wanted)


def flip(data: Path) -> None:
    file = max(data.rglob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def damage_digests(data: Path) -> None:
    (data / digests.DIGESTS).write_text("{}")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip, r"\.bin has another content than was prepared, as read on"),
    "digests.json": (damage_digests, r"digests.json cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_ends_the_run(config: Path, digits: Path, tmp_path: Path, name: str) -> None:
    """All ranks, with one message and the exit status that no launcher starts again."""
    change, cause = DAMAGE[name]
    data = shutil.copytree(digits, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    change(data)
    life = Life(["train", str(config), f"run.dir={tmp_path}", *SETTINGS, f"data.path={data}"], faults=SLOW)
    assert set(life.end().values()) == {3}, life.said
    assert re.search(cause, life.said) and "Traceback" not in life.said and "data verify" in life.said
    (told,) = events(tmp_path / "tiny")
    assert told["event"] == "data_damaged" and str(data) in told["problems"][0]
    assert Store.of_run(tmp_path / "tiny").steps() == []


def test_data_that_cannot_be_read_ends_nothing(config: Path, digits: Path, tmp_path: Path) -> None:
    data = shutil.copytree(digits, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    known = json.loads((data / digests.DIGESTS).read_text())
    known["files"]["folder"] = "0" * 32
    (data / digests.DIGESTS).write_text(json.dumps(known))
    (data / "folder").mkdir()
    life = Life(["train", str(config), f"run.dir={tmp_path}", *SETTINGS, f"data.path={data}"], faults=SLOW)
    assert set(life.end().values()) == {0}, life.said
    (told,) = events(tmp_path / "tiny")
    assert told["event"] == "data_unread" and "Is a directory" in told["reason"]
    assert "the data could not be checked" in life.said


def test_nodes_share_the_files(digits: Path) -> None:
    wanted = digests.read(digits) or {}
    readers = [Reader([digits], part=part, parts=3) for part in range(3)]
    for reader in readers:
        reader._work()
    assert sum(reader.found.files for reader in readers) == len(wanted)
    assert all(reader.found.done and reader.found.files < len(wanted) for reader in readers)
    assert Reader([digits], part=0, parts=0).found.done
