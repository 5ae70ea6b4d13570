# mmscale/data/documents/energon.py: shards and splits of a folder that `energon prepare` has indexed.
"""Tests of folders of Megatron-Energon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.documents import energon
from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.schema import Document
from mmscale.errors import DataError
from tests.unit.data.documents.test_reader_faults import pairs, tar

SPLIT = """
exclude: []
split_parts:
  train: ['shard_{00..01}.tar']
  val: [shard_02.tar]
  test: [shard_03.tar]
"""


def folder(path: Path, *, counts: dict[str, Any] | None = None, split: str = SPLIT, yaml: bool = False) -> Path:
    energon.shards_of.cache_clear()
    (path / ".nv-meta").mkdir(parents=True, exist_ok=True)
    for number in range(4):
        tar(path / f"shard_{number:02d}.tar", pairs(3))
    counts = counts or {f"shard_{number:02d}.tar": 3 for number in range(4)}
    if yaml:
        lines = "".join(f"  {name}: {count}\n" for name, count in counts.items())
        (path / ".nv-meta/.info.yaml").write_text(f"shard_counts:\n{lines}")
    else:
        (path / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": counts}))
    (path / ".nv-meta/split.yaml").write_text(split)
    return path


def splits(path: Path) -> list[str | None]:
    parts = scan_files(list_files([str(path)]), slice_records=2)
    return [one.split for part in parts for one in part.read() if isinstance(one, Document)]


@pytest.mark.parametrize("yaml", [False, True])
def test_shards_have_their_splits(tmp_path: Path, yaml: bool) -> None:
    assert splits(folder(tmp_path / "a", yaml=yaml)) == ["train"] * 6 + ["validation"] * 3
    assert splits(tmp_path / "a/shard_02.tar") == ["validation"] * 3  # a shard that is named by itself too


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    wrong = {f"shard_{number:02d}.tar": 4 for number in range(4)}
    with pytest.raises(DataError, match="has 3 samples, and energon's index says 4"):
        splits(folder(tmp_path / "a", counts=wrong))
    with pytest.raises(DataError, match=r"there is no 'shard_00\.tar'"):
        splits(folder(tmp_path / "b", counts={"x.tar": 1}))
    for number, text in enumerate(("split_parts: [", "split_parts: {train: ['{0..99999999}.tar']}", "[]")):
        with pytest.raises(DataError, match=r"the index of .* cannot be read"):
            splits(folder(tmp_path / f"c{number}", split=text))
