"""Validation sets of their own (`data.validation`): evaluated by name in every layout, stage and command."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.data.prepared.manifest import MANIFEST
from mmscale.data.prepared.questions import task_items
from mmscale.data.prepared.tasks import TaskItem
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.held_out import HeldOut
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import Ended, mmscale, undocumented

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (2, ()),
    "tp": (2, ("parallel.tp=2",)),
    "pp": (2, ("parallel.pp=2", "parallel.loss_chunk=24")),
    "ep": (2, ("parallel.ep=2",)),
    "cp": (2, ("parallel.cp=2", "parallel.ep=2")),
    "tp_ep": (4, ("parallel.tp=2", "parallel.ep=2")),  # parts of the vocabulary, and two replicas
}
TRAIN = (
    "data.document_multiple=4",
    "optim.warmup=1",
    "train.eval_every=0",
    "train.eval_batches=2",
    "checkpoint.every=0",
    "checkpoint.asynchronous=false",
)


@dataclass(frozen=True)
class Sets:
    """Copies of the digits.

    Attributes:
        same: holds the held-out documents, all to be read.
        seen: holds out what others train on.
        silent: holds nothing out.
        swapped: trains on what others hold out, and the reverse; has a task of the digits' name with few questions.
    """

    same: Path
    seen: Path
    silent: Path
    swapped: Path

    @property
    def settings(self) -> str:
        return f"data.validation={{same: {self.same}, seen: {self.seen}}}"


@pytest.fixture(scope="module")
def sets(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    folder = tmp_path_factory.mktemp("sets")
    splits = json.loads((digits / MANIFEST).read_text())["splits"]
    nothing: dict[str, Any] = {"parts": []}
    changed = {
        "same": {"train": splits["validation"], "validation": nothing},
        "seen": {"train": nothing, "validation": splits["train"]},
        "silent": {"train": splits["train"], "validation": nothing},
        "swapped": {"train": splits["validation"], "validation": splits["train"]},
    }
    for name, content in changed.items():
        shutil.copytree(digits, folder / name)
        change(folder / name, splits=content, tasks=[], source=f"digits, {name}")
    questions = (digits / "tasks/digit.jsonl").read_text().splitlines(keepends=True)
    (folder / "swapped/tasks/few.jsonl").write_text("".join(questions[:7]))
    change(folder / "swapped", tasks=[{"name": "digit", "file": "tasks/few.jsonl"}])
    return Sets(*(folder / name for name in changed))


def change(folder: Path, **content: Any) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def train(config: Path, runs: Path, *arguments: str, nproc: int = 1) -> Ended:
    settings = (f"run.dir={runs}", "model.auxiliary.mode=joint", *TRAIN)
    ep = () if any("parallel.ep" in text for text in arguments) else ("parallel.ep=1",)
    ended = mmscale("train", config, *settings, *ep, *arguments, nproc=nproc)
    assert ended.status == 0, ended
    return ended


@pytest.fixture(scope="module")
def alone(config: Path, sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A joint run of one process."""
    runs = tmp_path_factory.mktemp("alone")
    ended = train(config, runs, sets.settings, "train.steps=2", "log.tensorboard=true")
    return runs / "tiny", ended


def blended(digits: Path, sets: Sets) -> tuple[str, ...]:
    """A blend whose sources are measured one by one, validation sets, and questions that are asked along the run."""
    blend = f"data.blend=[{{path: {digits}, weight: 3}}, {{path: {sets.swapped}}}]"
    return ("data.path=null", blend, sets.settings, "train.tasks=[digit]", "train.steps=2")


@pytest.fixture(scope="module")
def alone_blended(
    config: Path, digits: Path, sets: Sets, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """A run of one process that keeps the checkpoint that is the best on one source."""
    runs = tmp_path_factory.mktemp("blended")
    best = ("checkpoint.keep_best=eval/source/swapped/loss/image", "train.eval_every=1")
    ended = train(config, runs, *blended(digits, sets), *best)
    return runs / "tiny", ended


def held_out(run: Path) -> dict[str, float]:
    return {key: value for key, value in read_metrics(run)[-1].items() if HeldOut.of(key) is not None}


def by_set(values: dict[str, float], name: str) -> dict[str, float]:
    """Figures of a set by routing and figure."""
    found = {key: HeldOut.of(key) for key in values}
    return {f"{one.routing} {one.figure}": values[key] for key, one in found.items() if one and one.name == name}


def test_each_is_reported_by_name(alone: tuple[Path, Ended], sets: Sets, tmp_path: Path) -> None:
    """In lines, metrics.jsonl, TensorBoard and the report; the same documents have the same losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, ended = alone
    values = held_out(run)
    assert undocumented(read_metrics(run)) == set()
    main = by_set(values, "")
    assert {"batch loss", "batch loss/image", "causal loss/text"} <= main.keys()
    assert by_set(values, "same") == main
    assert by_set(values, "seen").keys() == main.keys() and by_set(values, "seen") != main
    assert f"validation same: {sets.same}, 180 documents, all that it has" in ended.err or "same:" in ended.err
    for name in ("held-out", "validation same", "validation seen"):
        for routing in ("batch", "causal"):
            assert f"step 2: {name} ({routing} routing)  loss " in ended.err, ended.err
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert values.keys() <= set(shown.Tags()["scalars"])
    assert mmscale("report", run, "--out", tmp_path / "report.html", "--no-png").status == 0
    page = (tmp_path / "report.html").read_text()
    assert "Validation seen: loss per token" in page and "validation same (causal routing)" in page


def test_sources_and_tasks_are_measured(
    alone_blended: tuple[Path, Ended], digits: Path, sets: Sets, tmp_path: Path
) -> None:
    """By themselves, in lines, metrics.jsonl, the report and `eval`; one decides which checkpoint is the best."""
    run, ended = alone_blended
    values = held_out(run)
    assert undocumented(read_metrics(run)) == set()
    source, swapped = (by_set(values, f"source/{name}") for name in (digits.name, "swapped"))
    assert source == by_set(values, "same") and swapped == by_set(values, "seen")  # the same documents
    whole = by_set(values, "")
    assert whole["batch loss"] != source["batch loss"]
    assert {"batch accuracy/digit", "causal accuracy/digit"} <= whole.keys()
    questions = len((digits / "tasks/digit.jsonl").read_text().splitlines())
    assert all(0 <= value <= 1 for key, value in whole.items() if "accuracy" in key)
    said = f"task digit: {questions} questions of {digits}, guessing gets 10.0%; the task digit of {sets.swapped} is"
    assert f"{said} not asked" in ended.err, ended.err
    for line in ("source swapped (causal routing)  loss ", "accuracy/digit ", f"source {digits.name} (batch routing)"):
        assert line in ended.err, ended.err
    found = json.loads(mmscale("eval", run, "--routing", "causal", "--batches", "2", "--json").out)
    assert found["accuracy/digit"] == whole["causal accuracy/digit"]  # of the first source that has such a task
    task = found["tasks"]["digit"]
    assert (task["asked"], task["from"], task["not_asked"]) == (questions, str(digits), [str(sets.swapped)])
    for figure in ("loss", "loss/text", "loss/image"):
        assert found[f"source/swapped/{figure}"] == pytest.approx(swapped[f"causal {figure}"], rel=1e-6)
        assert found["batch"][f"source/swapped/{figure}"] == pytest.approx(swapped[f"batch {figure}"], rel=1e-6)
    assert mmscale("report", run, "--out", tmp_path / "report.html", "--no-png").status == 0
    page = (tmp_path / "report.html").read_text()
    for words in ("Source swapped: loss per token", "source swapped (causal routing)", "Accuracy: digit"):
        assert words in page
    column = {row["step"]: row["eval/source/swapped/loss/image"] for row in read_metrics(run) if "eval/loss" in row}
    assert Store.of_run(run).best() == min(column, key=column.__getitem__)


@pytest.mark.long
@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if n in ("pp", "cp", "tp_ep") else pytest.mark.exhaustive) for n in LAYOUTS]
)
def test_layouts_agree(
    layout: str,
    alone_blended: tuple[Path, Ended],
    config: Path,
    digits: Path,
    sets: Sets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where another node still reads an older file of questions: those of rank 0 are asked."""

    def older(settings: Config) -> dict[str, list[TaskItem]]:
        found = task_items(settings)
        return found if os.environ["RANK"] == "0" else {name: items[40:] for name, items in found.items()}

    monkeypatch.setattr("mmscale.train.run.task_items", older)  # of the forked ranks
    nproc, settings = LAYOUTS[layout]
    train(config, tmp_path, *blended(digits, sets), *settings, nproc=nproc)
    assert held_out(tmp_path / "tiny") == pytest.approx(held_out(alone_blended[0]), rel=1e-5)


def test_a_resumed_run_measures_the_same(
    alone_blended: tuple[Path, Ended], config: Path, digits: Path, sets: Sets, tmp_path: Path, monkeypatch: Any
) -> None:
    """And says which questions were edited in between."""
    monkeypatch.setenv(VARIABLE, "0:1:step:usr2")
    ask = tmp_path / "ask.jsonl"
    settings = (f"run.dir={tmp_path}", "model.auxiliary.mode=joint", "parallel.ep=1", *TRAIN, *blended(digits, sets))
    settings += (f"train.tasks=[digit, {ask}]",)
    for answer, status in ((" a", 75), (" b", 0)):
        ask.write_text(json.dumps({"content": [{"type": "text", "text": "this is"}], "answer": answer}))
        ended = mmscale("train", config, *settings)
        assert ended.status == status, ended
        monkeypatch.delenv(VARIABLE, raising=False)
    (changed,) = [line for line in ended.err.splitlines() if "changed since" in line]
    assert "task ask: other questions or answers, its accuracies are not comparable with earlier ones" in changed
    measured = held_out(tmp_path / "tiny")
    assert {key: value for key, value in measured.items() if "/ask" not in key} == held_out(alone_blended[0])


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        (("train.tasks=[cats]",), 3, "the data has no task 'cats' (it has: digit)"),
        (("train.tasks=[none.jsonl]",), 3, "none.jsonl cannot be read"),
        (("train.tasks=[digit, digit]",), 3, "two tasks are named digit"),
        (("checkpoint.keep_best=eval/source/other/loss", "train.eval_every=1"), 2, "did you mean eval/source/"),
        (("train.eval_sources=false", "checkpoint.keep_best=eval/source/swapped/loss"), 2, "nothing that this run"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    settings: tuple[str, ...], status: int, words: str, config: Path, digits: Path, sets: Sets, tmp_path: Path
) -> None:
    ended = mmscale("train", config, f"run.dir={tmp_path}", "parallel.ep=1", *TRAIN, *blended(digits, sets), *settings)
    assert ended.status == status and words in ended.err, ended
    assert not (tmp_path / "tiny").exists()


def test_a_source_without_held_out_documents(config: Path, digits: Path, sets: Sets, tmp_path: Path) -> None:
    """It is left out; nothing may wait for a figure of it."""
    blend = ("data.path=null", f"data.blend=[{{path: {digits}}}, {{path: {sets.silent}}}]", "train.steps=1")
    train(config, tmp_path, *blend)
    measured = {HeldOut.of(key).name for key in held_out(tmp_path / "tiny")}  # type: ignore[union-attr]
    assert measured == {"", f"source/{digits.name}"}
    waits = ("checkpoint.keep_best=eval/source/silent/loss", "train.eval_every=1")
    ended = mmscale("train", config, f"run.dir={tmp_path / 'other'}", "parallel.ep=1", *TRAIN, *blend, *waits)
    assert ended.status == 3 and f"is never measured: {sets.silent} has no held-out documents" in ended.err


@pytest.mark.long
def test_evaluation_stage_and_resume(alone: tuple[Path, Ended], config: Path, sets: Sets, tmp_path: Path) -> None:
    """`eval` gives what training gave; the stage reports each set; a set that was replaced is announced."""
    run = Path(shutil.copytree(alone[0], tmp_path / "tiny"))
    found = json.loads(mmscale("eval", run, "--routing", "causal", "--batches", "2", "--json").out)
    values = held_out(run)
    for name in ("", "same", "seen"):
        prefix = f"validation/{name}/" if name else ""
        for figure in ("loss", "loss/text", "loss/image"):
            causal, batch = (values[HeldOut(figure, routing, name).key] for routing in ("causal", "batch"))
            assert found[f"{prefix}{figure}"] == pytest.approx(causal, rel=1e-6)
            assert found["batch"][f"{prefix}{figure}"] == pytest.approx(batch, rel=1e-6)
            assert found["gap"][f"{prefix}{figure}"] == pytest.approx(causal - batch, abs=1e-6)
    other = json.loads(mmscale("eval", run, "--data", sets.seen, "--batches", "2", "--json").out)
    assert other["loss"] == pytest.approx(values["eval/validation/seen/loss"], rel=1e-6)
    assert not any("validation/" in key for key in other)

    stage = ("--stage", "auxiliary", "auxiliary.steps=2", "auxiliary.calibration_batches=0")
    ended = train(config, tmp_path, sets.settings, "train.steps=2", *stage)
    report = json.loads((run / "auxiliary" / "report.json").read_text())
    assert report["validation"].keys() == {"same", "seen"} and report["validation"]["same"] == report["held_out"]
    assert report["held_out"]["batch"]["loss"] == pytest.approx(values["eval/loss"], rel=1e-6)
    assert "validation seen (causal routing)  loss " in ended.err

    kept = {one["name"]: one for one in Store.of_run(run).info(2)["validation"]}
    assert kept.keys() == {"same", "seen"} and kept["seen"]["path"] == str(sets.seen)
    places = {name: Path(shutil.copytree(getattr(sets, name), tmp_path / name)) for name in ("same", "seen")}
    change(places["seen"], source="other documents")
    moved = f"data.validation={{same: {places['same']}, seen: {places['seen']}}}"
    ended = train(config, tmp_path, moved, "train.steps=3", nproc=2)
    assert "data.validation.seen holds other documents: its losses are not comparable" in ended.err
    assert "data.validation.same holds" not in ended.err and f'"{places["same"]}"' in ended.err


def test_sources_need_no_held_out_documents(config: Path, sets: Sets, tmp_path: Path) -> None:
    settings = (f"data.path={sets.silent}", f"data.validation.same={sets.same}")
    ended = train(config, tmp_path, *settings, "train.steps=2", "train.eval_every=1", "train.eval_batches=1")
    assert "step 1: validation same (batch routing)" in ended.err and "step 1: held-out" not in ended.err
    assert {HeldOut.of(key).name for key in held_out(tmp_path / "tiny")} == {"same"}  # type: ignore[union-attr]
    found = json.loads(mmscale("eval", tmp_path / "tiny", "--routing", "causal", "--batches", "1", "--json").out)
    assert found["routers"] and "loss" not in found
    assert found["validation/same/loss"] == pytest.approx(
        read_metrics(tmp_path / "tiny")[-1]["eval/validation/same/causal/loss"]
    )


def test_tasks_alone_are_enough_to_evaluate(config: Path, digits: Path, tmp_path: Path) -> None:
    """Nothing is held out, and no validation set is named."""
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    change(folder, splits=json.loads((digits / MANIFEST).read_text())["splits"] | {"validation": {"parts": []}})
    evaluated = (f"data.path={folder}", "train.steps=1", "train.eval_every=1", "train.tasks=[digit]")
    train(config, tmp_path, *evaluated)
    found = {HeldOut.of(key).figure for key in held_out(tmp_path / "tiny")}  # type: ignore[union-attr]
    assert found == {"accuracy/digit"}
    refused = mmscale(
        "train", config, f"run.dir={tmp_path / 'none'}", "parallel.ep=1", *TRAIN, *evaluated[:3], "train.tasks=[]"
    )
    assert refused.status == 3 and "there are no held-out documents to evaluate on every 1 steps" in refused.err


def test_an_export_is_evaluated_on_them(exported: Path, sets: Sets, tmp_path: Path) -> None:
    export = Path(shutil.copytree(exported / "tiny-hf", tmp_path / "hf"))
    content = json.loads((export / "config.json").read_text())
    content["mmscale"]["config"]["data"]["validation"] = {"same": str(sets.same)}
    (export / "config.json").write_text(json.dumps(content))
    (export / "MANIFEST.json").unlink()  # changed on purpose
    ended = mmscale("eval", export, "--batches", "2", "--json")
    assert ended.status == 0, ended
    found = json.loads(ended.out)
    assert found["validation/same/loss"] == found["loss"]
    assert found["validation/same/perplexity/text"] == found["perplexity/text"]
