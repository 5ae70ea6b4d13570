"""What `data prepare` says about held-out documents in training is said again where numbers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.goodput import goodput
from mmscale.cli import main
from mmscale.config import Config
from mmscale.data.prepared.leaks import leaks_of
from mmscale.data.prepared.manifest import read_blend, read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.report import page
from mmscale.runs.recorded_leaks import leaks_in
from mmscale.train.evaluated_on import EvaluatedOn
from tests.unit.data.prepared.test_shared_content import documents
from tests.unit.data.samples import config

REMEDY = 'Give such documents the same "group" and prepare again'


def prepared(folder: Path, *, grouped: bool, **settings: Any) -> Path:
    file = documents(folder / "in", grouped=grouped)
    prepare(config(documents=[str(file)], held_out=0.3, **settings), folder / "out", progress=False)
    return folder / "out"


def on(*sources: dict[str, Any], validation: dict[str, str] | None = None) -> Config:
    settings = config(documents=["x"]).model_dump(mode="json")
    settings["data"] = {"blend": sources, "validation": validation or {}}
    return Config.model_validate(settings)


def said(made: Config) -> list[str]:
    return [line for line in EvaluatedOn.of(made, read_blend(made), {}).lines if line.startswith("note: ")]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_says_and_records_it(grouped: bool, tmp_path: Path) -> None:
    out = prepared(tmp_path, grouped=grouped)
    made = on({"path": str(out)})
    found = EvaluatedOn.of(made, read_blend(made), {})
    lines = [line for line in found.lines if line.startswith("note: ")]
    assert [line.removeprefix("note: ") for line in lines] == found.start_fields.get("leaks", [])
    if grouped:
        assert lines == []
        return
    pictures, texts = lines
    assert "items (" in pictures and "pure texts (" in texts
    assert all(f"%) of held-out documents of {out} are in training documents too" in line for line in lines)
    assert all(REMEDY in line for line in lines)


def test_what_is_not_trained_on_leaks_nothing(tmp_path: Path) -> None:
    """Not the training documents of a set that is only evaluated."""
    leaking, other = (
        prepared(tmp_path / name, grouped=grouped, text={"kind": "bytes"})
        for name, grouped in (("a", False), ("b", True))
    )
    assert len(said(on({"path": str(leaking)}, {"path": str(other)}))) == 2
    assert said(on({"path": str(leaking), "weight": 0}, {"path": str(other)})) == []
    assert said(on({"path": str(other)}, validation={"web": str(leaking)})) == []


def test_a_set_that_trains_on_what_another_holds_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = prepared(tmp_path, grouped=True), tmp_path / "second"
    file = tmp_path / "in" / "d.jsonl"
    arguments = ["data", "prepare", "--documents", str(file), "--like", str(first), "--out", str(second)]
    assert main([*arguments, "data.prepare.held_out=0"]) == 0
    capsys.readouterr()
    both = said(on({"path": str(first)}, {"path": str(second)}))
    assert len(both) == 2 and all(f"of {first} are in training documents of {second} too" in line for line in both)
    assert said(on({"path": str(second)}, validation={"first": str(first)})) == both
    assert said(on({"path": str(second)})) == []  # nobody reads what the first one holds out
    assert main(["data", "inspect", str(second)]) == 0
    assert f"of {first} are in training documents of {second} too" in " ".join(capsys.readouterr().out.split())
    prepare(config(documents=[str(documents(tmp_path / "new", grouped=True))], held_out=0.3), second, overwrite=True)
    assert leaks_of({second: read_manifest(second)}, {first: read_manifest(first)}) == []


def test_inspect_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepared(tmp_path, grouped=False)
    assert main(["data", "inspect", str(out)]) == 0
    assert REMEDY in " ".join(capsys.readouterr().out.split())
    assert main(["data", "inspect", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["leaks"]) == 2


def run_of(folder: Path, leaks: Any) -> Path:
    folder.mkdir()
    sources = [{"path": "d", "tokens": {"text": 10}, "max_epochs": None, "passes": [[0, 0.0], [5, 1.0]]}]
    events = [{"time": 1.0, "attempt": 1, "event": "start", "step": 0, "sources": sources, "leaks": leaks}]
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    (folder / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "loss": 2.0, "loss/text": 2.0}\n')
    (folder / "config.yaml").write_text("train: {steps: 5}\n")
    return folder


def test_the_page_and_inspect_of_a_run_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", ["9 of <13> items"])
    page.write_page(page.read_runs([run], goodput=goodput), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<li>run: 9 of &lt;13&gt; items.</li>" in text
    assert main(["data", "inspect", str(run)]) == 0
    assert "9 of <13> items" in capsys.readouterr().out
    assert main(["data", "inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leaks"] == ["9 of <13> items"]


@pytest.mark.parametrize("leaks", [None, "x", 3, [3], {}])
def test_events_of_another_kind(leaks: Any, tmp_path: Path) -> None:
    assert leaks_in([{"event": "start", "step": 0, "leaks": leaks}]) == []


def test_of_the_attempt_that_a_checkpoint_comes_from() -> None:
    events = [{"event": "start", "step": 0, "leaks": ["old"]}, {"event": "resume", "step": 10}]
    assert (leaks_in(events, step=5), leaks_in(events, step=10), leaks_in(events)) == (["old"], [], [])
