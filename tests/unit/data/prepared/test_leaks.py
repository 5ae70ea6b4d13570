"""What `data prepare` says about held-out documents in training is said again where numbers are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.goodput import goodput
from mmscale.cli import main
from mmscale.config import Config
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.leaks import leaks_of_settings
from mmscale.data.prepared.manifest import read_blend, read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.shared_content import PAGE, Shared
from mmscale.data.stream.segment_settings import SegmentSource
from mmscale.report import page
from mmscale.runs.recorded_leaks import leaks_in
from mmscale.train.evaluated_on import EvaluatedOn
from mmscale.train.learned_data import LEARNED, carried, learned_from, made_from, read_before
from mmscale.train.stages import sft_settings
from tests.unit.data.prepared.test_shared_content import documents
from tests.unit.data.samples import config, write_jsonl

ROOT = Path(__file__).parents[4]
REMEDY = f'Give documents of the same content one "group" and prepare again ({PAGE})'


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
    assert "pictures (" in pictures and "pure texts (" in texts
    assert all(f"%) of held-out documents of {out} are in training documents too" in line for line in lines)
    assert all(REMEDY in line for line in lines)


def test_what_is_not_trained_on_leaks_nothing(tmp_path: Path) -> None:
    """Not the training documents of a set that is only evaluated."""
    leaking = prepared(tmp_path / "a", grouped=False, text={"kind": "bytes"})
    records = [{"id": str(n), "content": [{"type": "text", "text": f"other {n}"}]} for n in range(40)]
    file, other = write_jsonl(tmp_path / "b" / "d.jsonl", records), tmp_path / "b" / "out"
    prepare(config(documents=[str(file)], held_out=0.3, text={"kind": "bytes"}), other, progress=False)
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
    other = config(documents=[str(documents(tmp_path / "new", grouped=True))], held_out=0.0)
    prepare(other, second, overwrite=True)
    assert main(["data", "inspect", str(second)]) == 0
    assert f"of {first}" not in " ".join(capsys.readouterr().out.split())  # a set that was prepared like nothing


@pytest.fixture
def reversed_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path, str]:
    """Two sets of one document file: what the first one trains on the second one holds out. And what prepare says."""
    file = documents(tmp_path / "in", grouped=True)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for name, low in (("train", 30), ("validation", 0)):
        own = [
            one | {"split": "validation" if low <= int(one["group"]) < low + 10 else "train"}
            for one in records
            if name == "train" or int(one["group"]) < 20
        ]
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", own)
    first, second = tmp_path / "first", tmp_path / "second"
    prepare(config(documents=[str(tmp_path / "in" / "train.jsonl")]), first, progress=False)
    capsys.readouterr()
    arguments = ["--documents", str(tmp_path / "in" / "validation.jsonl"), "--like", str(first), "--out", str(second)]
    assert main(["data", "prepare", *arguments]) == 0
    return first, second, capsys.readouterr().err


def test_the_other_direction_is_said_at_prepare(reversed_sets: tuple[Path, Path, str]) -> None:
    """Held-out documents of the new set in training documents of the one that it is prepared like."""
    first, second, err = reversed_sets
    assert f"note: 20 of 20 pictures (100.0%) of held-out documents of {second} are in training documents of" in err
    assert f"training documents of {first} too" in err and f"held-out documents of {first}" not in err


@pytest.mark.parametrize("how", ["blend", "reversed", "validation", "evaluated only", "trained only"])
def test_every_pair_of_sets_of_a_run_is_compared(how: str, reversed_sets: tuple[Path, Path, str]) -> None:
    first, second, _ = reversed_sets
    one, two = {"path": str(first)}, {"path": str(second)}
    made = {
        "blend": lambda: on(one, two),
        "reversed": lambda: on(two, one),
        "validation": lambda: on(one, validation={"rev": str(second)}),
        "evaluated only": lambda: on(one, two | {"weight": 0}),
        "trained only": lambda: on(two),
    }[how]()
    lines = said(made)
    assert len(lines) == (0 if how == "trained only" else 2), lines
    assert all(f"of held-out documents of {second} are in training documents of {first} too" in line for line in lines)


@pytest.mark.parametrize("weights", [(1.0, ()), (0.0, ((3, 1.0),)), (0.0, ())], ids=["trained", "later", "never"])
@pytest.mark.parametrize("now", ["as it was", "moved", "missing", "other documents", "other tokenizers"])
@pytest.mark.parametrize("by", ["stage", "stage that goes on as a run", "stage of a fused run", "fused run", "mean"])
def test_a_stage_names_what_the_main_run_has_trained_on(
    by: str, now: str, weights: tuple[float, Any], reversed_sets: tuple[Path, Path, str]
) -> None:
    """Weights of the stage know the main run's documents, so held-out conversations should not be among them."""
    first, second, _ = reversed_sets
    stage = sft_settings.stage_config(
        Config.model_validate(on({"path": str(first)}).model_dump() | {"sft": {"path": str(second)}})
    )
    weight, later = weights
    identity = identity_of(first, read_manifest(first))
    saved = {"data": [{"path": str(first), "weight": weight, "later": later, "identity": identity}]}
    other = {"data": [saved["data"][0] | {"identity": "none", "weight": 0.0, "later": ()}]}
    made = {
        "stage": {"sft": {"main_step": 4, LEARNED: learned_from(saved)}},
        "stage that goes on as a run": carried({"sft": {"main_step": 4, LEARNED: learned_from(saved)}, "tasks": []}),
        "stage of a fused run": {"sft": {"main_step": 4, LEARNED: learned_from(made_from(saved, other))}},
        "fused run": made_from(saved, other),
        "mean": made_from(saved, other, newest=other),
    }
    origin = json.loads(json.dumps(made[by]))
    if now == "moved":  # the stage reads it too, from where it is now
        moved = first.rename(first.with_name("elsewhere"))
        blend = {"path": None, "blend": [{"path": str(second)}, {"path": str(moved), "weight": 0}]}
        stage = sft_settings.stage_config(Config.model_validate(stage.model_dump() | {"sft": blend}))
        first = moved
    elif now == "missing":
        shutil.rmtree(first)
    elif now == "other documents":
        prepare(config(documents=[str(first.parent / "in" / "d.jsonl")]), first, progress=False, overwrite=True)
    elif now == "other tokenizers":
        content = json.loads((first / "manifest.json").read_text())
        tokenizers = content["tokenizers"] | {"image": "another"}
        (first / "manifest.json").write_text(json.dumps(content | {"tokenizers": tokenizers}))
    found = EvaluatedOn.of(stage, read_blend(stage), {}, origin).start_fields.get("leaks", [])
    if weights == (0.0, ()):
        assert found == []
    elif now in ("as it was", "moved"):
        assert len(found) == 2
        assert all(
            f"of held-out documents of {second} are in training documents of {first} too" in one for one in found
        )
    else:
        why = {
            "missing": "which cannot be read",
            "other documents": "which were replaced after the run read them",
            "other tokenizers": "which have other tokenizers",
        }
        assert found == [f"held-out documents are not compared with the training documents of {first}, {why[now]}"]


@pytest.mark.parametrize("now", ["as it was", "moved", "missing", "other documents", "weight 0", "trained again"])
@pytest.mark.parametrize("read", [{"taken": 4}, {"more": (2,)}, {}], ids=["read", "with gaps", "not read"])
def test_a_set_that_an_earlier_attempt_has_read(
    now: str, read: dict[str, Any], reversed_sets: tuple[Path, Path, str]
) -> None:
    """A blend that drops a set leaves its documents in the weights: in the run itself, in `eval` and in a stage."""
    first, second, _ = reversed_sets
    identity = identity_of(first, read_manifest(first))
    part = SegmentSource(path=str(first), identity=identity, share=0.5, **read)
    own = SegmentSource(path=str(second), identity=identity_of(second, read_manifest(second)), share=0.5, taken=3)
    stream = json.loads(json.dumps([{"parts": [part.model_dump(), own.model_dump()]}, {"parts": [own.model_dump()]}]))
    again: list[dict[str, Any]] = []
    if now == "moved":
        again = [{"path": str(first.rename(first.parent / "elsewhere")), "weight": 1}]
    elif now == "missing":
        shutil.rmtree(first)
    elif now == "other documents":
        prepare(config(documents=[str(first.parent / "in" / "d.jsonl")]), first, progress=False, overwrite=True)
    elif now != "as it was":
        again = [{"path": str(first), "weight": 0 if now == "weight 0" else 1}]
    made = on({"path": str(second)}, *again)
    before = EvaluatedOn.of(made, read_blend(made), {})
    after = before.with_earlier(made, stream)
    leaks = after.start_fields.get("leaks", [])
    evaluated = leaks_of_settings(made, made, read=[own.identity], before=read_before(stream))
    main = learned_from({"data": [{"path": str(second), "weight": 1.0, "identity": own.identity}]}, stream)
    assert [one["path"] for one in main] == [str(second), *([str(first)] if read else [])]
    assert after.lines[: len(before.lines)] == before.lines and after.kept == before.kept
    new = leaks[len(before.start_fields.get("leaks", [])) :]
    assert new == [line.removeprefix("note: ") for line in after.lines[len(before.lines) :]]
    if not read or now in ("moved", "trained again"):  # trained on now, so it is compared anyway
        assert after == before
    elif now in ("as it was", "weight 0"):
        assert len(new) == 2 and all(
            f"of held-out documents of {second} are in training documents of {first} too" in line for line in new
        )
        assert [line for line in evaluated if str(first) in line] == new
    else:
        (line,) = new
        assert f"not compared with the training documents of {first}, which" in line
        assert line in evaluated


def test_documents_of_a_validation_set_without_held_out_ones(tmp_path: Path) -> None:
    """All of its documents are evaluated, and those that are trained on count."""
    out = prepared(tmp_path, grouped=True, text={"kind": "bytes"})
    whole, settings = tmp_path / "whole", {"held_out": 0.0, "text": {"kind": "bytes"}}
    prepare(config(documents=[str(tmp_path / "in" / "d.jsonl")], **settings), whole, progress=False)
    lines = said(on({"path": str(out)}, validation={"web": str(whole)}))
    assert len(lines) == 2 and all(
        f"of documents of {whole} are in training documents of {out} too" in one for one in lines
    )


@pytest.mark.parametrize("lost", ["missing", "damaged", "of other documents"])
def test_sets_without_facts_are_not_compared(lost: str, reversed_sets: tuple[Path, Path, str]) -> None:
    first, second, _ = reversed_sets
    file = second / ".cache" / "keys.npy"
    if lost == "missing":
        file.unlink()
    elif lost == "damaged":
        file.write_bytes(b"x" * 40)
    else:
        file.write_bytes((first / ".cache" / "keys.npy").read_bytes())
    (line,) = said(on({"path": str(first)}, {"path": str(second)}))
    assert (
        f"not compared with training documents where {second} is concerned" in line
        and f"mmscale data inspect {second}" in line
    )
    assert main(["data", "inspect", str(second)]) == 0
    assert len(said(on({"path": str(first)}, {"path": str(second)}))) == 2


def test_a_set_of_an_earlier_version_is_not_compared_with_itself(tmp_path: Path) -> None:
    out = prepared(tmp_path, grouped=False)
    (out / ".cache" / "content.json").write_text('{"shared": {"pictures": [1, 2], "texts": [0, 1]}}')
    (line,) = said(on({"path": str(out)}))
    assert "not compared" in line
    assert main(["data", "inspect", str(out)]) == 0
    assert len(said(on({"path": str(out)}))) == 2


def test_the_command_that_inspect_names_marks_them(
    reversed_sets: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = reversed_sets
    assert main(["data", "inspect", str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["leaks"]) == 2
    (command,) = found["marked_by"]
    assert command == f"mmscale data inspect {second} --held-out --trained-on {first}"
    assert main(command.split()[1:]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed and all(line.endswith(f"(in training of {first} too)") for line in listed)
    assert main(["data", "inspect", str(second), "--held-out"]) == 0
    assert "(in training" not in capsys.readouterr().out
    assert main(["data", "inspect", str(first), "--trained-on", str(second)]) == 2
    assert "--trained-on" in capsys.readouterr().err


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


@pytest.mark.parametrize("sets", [{}, {"of": "/data/first"}, {"of": "/data/first", "here": "/data/second"}])
@pytest.mark.parametrize("held_out", [True, False])
def test_a_line_is_short_and_ends_with_a_page(sets: dict[str, str], held_out: bool) -> None:
    lines = Shared({"image": (13, 13), "audio": (1200, 3000)}, (7, 9)).lines(**sets, held_out=held_out)
    assert len(lines) == 3 and max(map(len, lines)) < 290 + sum(map(len, sets.values()))
    page, _, anchor = PAGE.partition("#")
    assert all(line.endswith(f"({PAGE})") and line.count(". ") == 1 for line in lines)
    assert f"## {anchor}" in (ROOT / page).read_text().replace(" ", "-").replace("#-", "# ").lower()


def test_of_a_long_line_the_remedy_is_kept() -> None:
    folder = "/data/" + "long/" * 400
    (line,) = Shared({}, (7, 9)).lines(of=folder, here=folder)
    (kept,) = leaks_in([{"event": "start", "step": 0, "leaks": [line]}])
    assert kept.startswith("7 of 9 pure texts") and kept.endswith(f"data.prepare.held_out ({PAGE})")
    assert len(kept) < 1100
