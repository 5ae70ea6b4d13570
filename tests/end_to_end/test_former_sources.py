# tests/unit/data/golden/built_in_digits: manifest and source of a set, and the settings of a run on it, from before the
# digits became an example. Parts and tokenizers are those of the example's documents (test_example_digits.py).
"""Data sets and runs of `data.prepare.source: digits` are used as before; `data prepare` names the program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.digits import named
from tests.end_to_end.running import ROOT, assert_says, change_settings, listing, mmscale, ok

GOLDEN = Path(__file__).parents[1] / "unit" / "data" / "golden" / "built_in_digits"
OLD: dict[str, Any] = yaml.safe_load((GOLDEN / "config.yaml").read_text())


@pytest.fixture(scope="module")
def made(digits_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set`, with its old manifest; `runs/old`, a run of two steps whose checkpoint has old settings."""
    root = tmp_path_factory.mktemp("old")
    prepare = {key: value for key, value in OLD["data"]["prepare"].items() if key not in ("source", "augment", "emoji")}
    spec = OLD | {"data": OLD["data"] | {"prepare": prepare | named(digits_documents)}}
    (root / "spec.yaml").write_text(yaml.safe_dump(spec))
    ok("data", "prepare", root / "spec.yaml", "--out", root / "set")
    for name in ("manifest.json", "source.json"):
        shutil.copyfile(GOLDEN / name, root / "set" / name)
    place = (f"run.dir={root / 'runs'}", f"data.path={root / 'set'}")
    ok("train", root / "spec.yaml", *place, "train.steps=2")
    shutil.copyfile(GOLDEN / "config.yaml", root / "runs/old/config.yaml")
    change_settings(root / "runs/old", lambda settings: settings["data"].update(prepare=OLD["data"]["prepare"]))
    return root


@pytest.fixture
def old(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "old"))
    return tmp_path / "old"


def test_a_run_resumes_and_is_evaluated(old: Path) -> None:
    prepare = json.loads((old / "runs/old/checkpoints/step_00000002/mmscale.json").read_text())["config"]["data"][
        "prepare"
    ]
    assert prepare["source"] == "digits" and {"augment", "emoji"} <= set(prepare)
    ended = mmscale("train", "runs/old/config.yaml", "train.steps=4", "train.eval_every=0")
    assert ended.status == 0, ended
    assert "resumes after step 2 of 4" in ended.out + ended.err and "data.prepare" not in ended.err
    assert [line["step"] for line in read_metrics(old / "runs/old") if "loss" in line] == [1, 2, 3, 4]
    found = json.loads(ok("eval", "runs/old", "--batches", "1", "--json"))
    assert 0 <= found["accuracy/digit"] <= 1 and found["step"] == 4


@pytest.mark.long
def test_a_run_is_exported(old: Path) -> None:
    ok("convert", "to-hf", "runs/old", "hf", timeout_s=400)
    assert json.loads(ok("eval", "hf", "--data", "set", "--batches", "1", "--json"))["routing"] == "none"


def test_a_set_is_read_and_verified_and_has_successors(old: Path, digits_documents: Path) -> None:
    assert json.loads(ok("data", "verify", "set", "--json"))["damaged"] == {}
    assert "598 documents" in ok("data", "inspect", "set")
    documents = digits_documents / "documents.jsonl"
    ok("data", "prepare", "--documents", documents, "--like", "set", "--out", "more", "data.prepare.held_out=0.25")
    parts = [f"{split}/00000.bin" for split in ("train", "validation")]
    assert all((old / "more" / part).read_bytes() == (old / "set" / part).read_bytes() for part in parts)


@pytest.mark.parametrize("source", ["digits", "emoji"])
@pytest.mark.parametrize("out", ["set", "new"])
def test_preparing_names_the_program(old: Path, source: str, out: str) -> None:
    before = listing(old)
    ended = mmscale("data", "prepare", GOLDEN / "config.yaml", f"data.prepare.source={source}", "--out", out)
    assert_says(
        ended, status=2, cause=f"data.prepare.source = {source}", remedy=f"examples/{source}/write_documents.py"
    )
    assert listing(old) == before
    for name in (f"examples/{source}/write_documents.py", f"configs/{'quickstart' if source == 'digits' else source}"):
        assert list(ROOT.glob(f"{name}*")) and name in ended.err
