"""Checkpoints of fewer files (`checkpoint.writers`) in whole runs: another layout, memory, archives, copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale
from tests.end_to_end.test_train import EXACT

SETTINGS = ("train.eval_every=0", "train.dry_run=false", "checkpoint.every=3", "resilience.memory_every=2")


@pytest.mark.long
def test_grouped_checkpoints_are_the_same_in_every_use(config: Path, tmp_path: Path) -> None:
    def ok(*arguments: str | Path, nproc: int = 1) -> str:
        ended = mmscale(*arguments, nproc=nproc)
        assert ended.status == 0, (arguments, ended)
        return ended.out

    numbers = {}
    for writers in (0, 1):
        runs = tmp_path / f"{writers}"
        start = ("train", config, f"run.dir={runs}", *SETTINGS, f"checkpoint.writers={writers}")
        ok(*start, "train.steps=6", "parallel.ep=2", nproc=2)
        run = runs / "tiny"
        files = sorted(file.name for file in Store.of_run(run).path(6).glob("*.distcp"))
        assert files == (["__0_0.distcp"] if writers else ["__0_0.distcp", "__1_0.distcp"])
        ok("ckpt", "archive", f"{run}@6", tmp_path / f"archive{writers}")
        ok("ckpt", "reshard", f"{run}@6", runs / "copy")
        ok(*start, "train.steps=8", "parallel.ep=1")
        numbers[writers] = [[line.get(key) for key in EXACT] for line in read_metrics(run)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 8
    one, other = (tmp_path / f"{writers}" for writers in (0, 1))
    for left, right in ((one / "tiny@6", other / "tiny@6"), (tmp_path / "archive0", tmp_path / "archive1")):
        found = json.loads(ok("ckpt", "diff", left, right, "--json"))
        assert found["equal"] is True, found
    assert json.loads(ok("ckpt", "verify", other / "tiny", "--json"))["whole"]
