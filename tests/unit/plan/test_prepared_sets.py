"""`mmscale plan --data` with several prepared data sets: a blend of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.cli import main
from mmscale.config.load import resolve
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.survey import survey
from mmscale.errors import DataError
from mmscale.plan.sizing import propose
from mmscale.plan.sizing_inputs import Machine
from tests.unit.data.samples import config, corpus

LAPTOP = Machine("a laptop", "cpu", 2, 5e10)


def prepared(folder: Path, count: int, **settings: Any) -> str:
    file = corpus(folder / "in", count)
    prepare(config(documents=[str(file)], text={"kind": "bytes"}, **settings), folder / "out", progress=False)
    return str(folder / "out")


def test_several_sets_are_blended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [prepared(tmp_path / name, count) for name, count in (("a", 40), ("b", 120))]
    alone = [survey([one]) for one in sets]
    both = survey(sets)
    assert both.where == tuple(sets) and both.documents == sum(one.documents for one in alone)
    assert both.images == sum(one.images for one in alone)
    assert both.tokens == {name: sum((one.tokens or {})[name] for one in alone) for name in ("text", "image")}
    assert both.longest == max(one.longest or 0 for one in alone)
    assert both.held_out == sum(one.held_out or 0 for one in alone)
    made = resolve(propose(both, LAPTOP, budget_s=600).settings)
    assert [one.path for one in made.data.sources] == sets
    tokens = [sum((one.tokens or {}).values()) for one in alone]
    shares = [one.weight / sum(source.weight for source in made.data.sources) for one in made.data.sources]
    assert shares == pytest.approx([one / sum(tokens) for one in tokens], rel=1e-3)
    out = tmp_path / "made.yaml"
    assert main(["plan", "--data", sets[0], "--data", sets[1], "--budget", "10m", "--out", str(out)]) == 0
    assert [one["path"] for one in yaml.safe_load(out.read_text())["data"]["blend"]] == sets
    assert "data prepare" not in capsys.readouterr().out


def test_sets_that_cannot_be_blended_are_refused(tmp_path: Path) -> None:
    first, other = prepared(tmp_path / "a", 40), prepared(tmp_path / "b", 40, vocab={"text": 310, "image": 16})
    with pytest.raises(DataError, match="other ids") as refused:
        survey([first, other])
    assert "--like" in (refused.value.remedy or "")
    with pytest.raises(DataError, match="prepared data sets and document files") as refused:
        survey([first, str(tmp_path / "b" / "in" / "docs.jsonl")])
    with pytest.raises(DataError, match="is no prepared data set"):
        survey([first, str(tmp_path)])
    with pytest.raises(DataError, match="is a folder without a prepared data set"):
        survey([str(tmp_path)])
