"""What differs from a checkpoint, crossed with what is done with it: right, refused in words, or only with `--yes`.

A run goes on, or its stage does, with changed settings and data; evaluation, export and drawing compute the checkpoint,
whatever the latest attempt's config.yaml says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mmscale.checkpoint.layout import Store
from mmscale.train.metrics import read_metrics
from tests.end_to_end.running import Ended, assert_says, change_settings, mmscale


@dataclass(frozen=True)
class Cell:
    """A change.

    Attributes:
        overrides: of the configuration; DATA stands for a copy of the data, OTHER for one with other documents.
        asks: what `train` names when it refuses without `--yes`; "": it goes on.
        says: what it prints when it goes on.
        stage: what the auxiliary stage names when it refuses; "": it goes on.
    """

    overrides: tuple[str, ...]
    asks: str = ""
    says: str = "changed since the checkpoint: "
    stage: str = ""


ORDER = "data: another order from sequence 120 on; epochs that were begun are read to their end, no document is read"
CELLS = {
    "settings": Cell(("model.rope_base=500000",), asks="model.rope_base", stage="model.rope_base"),
    "blend": Cell(
        ("data.path=null", "data.blend=[{path: DIGITS}, {path: OTHER, weight: 2}]"), asks="OTHER is new", says=ORDER
    ),
    "batch": Cell(("train.micro_batch_size=4",), says=ORDER),
    "sequence": Cell(("model.seq_length=128",), asks="model.seq_length", says=ORDER, stage="model.seq_length"),
    "moved": Cell(("data.path=DATA",), says="DATA, the same documents"),
    "replaced": Cell(("data.path=OTHER",), asks="DIGITS is left out; data: OTHER is new", says=ORDER),
}
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def places(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    for name in ("moved", "other"):
        shutil.copytree(digits, folder / name)
    manifest = folder / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "other documents"}))
    return {"DIGITS": str(digits), "DATA": str(folder / "moved"), "OTHER": str(folder / "other")}


def filled(text: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        text = text.replace(name, path)
    return text


@dataclass(frozen=True)
class Subject:
    """What goes on: a run, or its stage.

    Attributes:
        source: name of the finished run, below `exported`.
        folder: where it is, below the run's folder.
        steps: that it has done.
        more: arguments that make it take one step more.
    """

    source: str
    folder: str
    steps: int
    more: tuple[str, ...]


SUBJECTS = {
    "run": Subject("bare", "", 30, ("train.steps=31",)),
    "stage": Subject(
        "tiny", "auxiliary", 12, ("--stage", "auxiliary", "auxiliary.steps=13", "auxiliary.optim.lr=1e-2")
    ),
}
# Layouts at the resume of a run of one process: ranks, settings.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (2, ()),
    "tp": (2, ("parallel.tp=2",)),
    "pp": (2, ("parallel.pp=2",)),
    "ep": (2, ("parallel.ep=2",)),
}
# One micro-batch of four sequences is the whole batch.
NOT_SHARED_OUT = {("batch", "dp"), ("batch", "ep")}


@dataclass
class Course:
    """A subject with a change, wherever and however it goes on."""

    config: Path
    exported: Path
    places: dict[str, str]
    subject: Subject
    cell: Cell
    is_stage: bool

    def settings(self, run: Path) -> list[str]:
        fixed = ("train.eval_every=0", "train.eval_batches=1", "checkpoint.asynchronous=false", "checkpoint.every=0")
        changed = [filled(text, self.places) for text in self.cell.overrides]
        return [f"run.dir={run.parent}", *fixed, *changed, *self.subject.more]

    def act(self, place: Path, act: Callable[..., Ended]) -> Ended | None:
        """Let it go on, with `--yes` where it asks for that; None: it is refused, `--yes` or not.

        Args:
            place: where its copy is made.
            act: called with arguments of a command.
        """
        cell, run = self.cell, place / "tiny"
        shutil.copytree(self.exported / self.subject.source, run)
        folder, settings = run / self.subject.folder, self.settings(run)
        ended = act(*settings)
        if self.is_stage and cell.stage:
            cause = f"another function than that of .*{cell.stage}"
            for other in (ended, act(*settings, "--yes")):
                assert_says(other, status=2, cause=cause, remedy="restore")
            return None
        if cell.asks:
            assert_says(ended, status=2, cause=filled(cell.asks, self.places), remedy="--yes")
            assert Store.of_run(folder).steps() == [self.subject.steps]
            ended = act(*settings, "--yes")
        assert ended.status == 0, ended
        assert Store.of_run(folder).steps()[-1] == read_metrics(folder)[-1]["step"] == self.subject.steps + 1
        return ended

    def loss(self, place: Path) -> float:
        """Of the step that was taken."""
        return float(read_metrics(place / "tiny" / self.subject.folder)[-1]["loss"])


@pytest.fixture
def course(config: Path, exported: Path, places: dict[str, str]) -> Callable[[str, str], Course]:
    def of(subject: str, name: str) -> Course:
        return Course(config, exported, places, SUBJECTS[subject], CELLS[name], subject == "stage")

    return of


Courses = Callable[[str, str], Course]


@pytest.mark.parametrize("name", CELLS)
def test_a_run_goes_on(name: str, config: Path, course: Courses, places: dict[str, str], tmp_path: Path) -> None:
    ended = course("run", name).act(tmp_path, lambda *more: mmscale("train", config, "parallel.ep=1", *more))
    assert ended is not None and filled(CELLS[name].says, places) in ended.err


def test_a_run_without_held_out_documents(config: Path, digits: Path, tmp_path: Path) -> None:
    """It trains where nobody asks for an evaluation, and says that there is none."""
    folder = Path(shutil.copytree(digits, tmp_path / "all"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["validation"] = {"parts": []}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tasks": []}))
    command = ("train", config, f"run.dir={tmp_path}", f"data.path={folder}", "parallel.ep=1", "train.steps=5")
    refused = mmscale(*command)
    assert_says(refused, status=3, cause="no held-out documents to evaluate on every 30", remedy="train.eval_every=0")
    ended = mmscale(*command, "train.eval_every=0")
    assert ended.status == 0 and "nothing is evaluated" in ended.err, ended
    assert not any(key.startswith("eval/") for line in read_metrics(tmp_path / "tiny") for key in line)
    assert_says(
        mmscale("eval", tmp_path / "tiny"), status=3, cause="'validation' of .* has no documents", remedy="held"
    )


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_another_layout_goes_on(subject: str, name: str, config: Path, course: Courses, tmp_path: Path) -> None:
    """With the number of one process, or it is refused in words."""
    one = course(subject, name)

    def act(nproc: int, *settings: str) -> Callable[..., Ended]:
        ep = () if "parallel.ep=2" in settings else ("parallel.ep=1",)
        return lambda *more: mmscale("train", config, *ep, *settings, *more, nproc=nproc)

    alone = one.act(tmp_path / "alone", act(1))
    for layout, (nproc, settings) in LAYOUTS.items():
        place = tmp_path / layout
        if (name, layout) in NOT_SHARED_OUT:
            shutil.copytree(one.exported / one.subject.source, place / "tiny")
            ended = act(nproc, *settings)(*one.settings(place / "tiny"), "--yes")
            assert_says(ended, status=2, cause="global_batch_size", remedy="multiple|divisible|raise|use")
            continue
        ended = one.act(place, act(nproc, *settings))
        assert (ended is None) == (alone is None)
        if ended is not None:
            assert one.loss(place) == pytest.approx(one.loss(tmp_path / "alone"), rel=1e-5), layout


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_launch_goes_on(subject: str, name: str, config: Path, course: Courses, tmp_path: Path) -> None:
    """Refused before anything is written; else it takes the step that `train` takes."""
    one = course(subject, name)
    alone = one.act(tmp_path / "alone", lambda *more: mmscale("train", config, "parallel.ep=1", *more))

    def launch(*more: str) -> Ended:
        folder = tmp_path / "launched" / "tiny" / one.subject.folder / "launch"
        dry = mmscale("launch", config, "--cluster", "local", "parallel.ep=1", *more, "--dry-run")
        assert not folder.exists()
        ended = mmscale("launch", config, "--cluster", "local", "parallel.ep=1", *more, timeout_s=400)
        assert folder.exists() == (ended.status == 0) and dry.status == ended.status
        if ended.status:
            assert dry.err == ended.err
        return ended

    ended = one.act(tmp_path / "launched", launch)
    assert (ended is None) == (alone is None)
    if ended is not None:
        assert one.loss(tmp_path / "launched") == one.loss(tmp_path / "alone")


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
def test_it_is_computed_as_it_was_trained(
    name: str, config: Path, exported: Path, places: dict[str, str], tmp_path: Path
) -> None:
    """By evaluation, export and drawing, after an attempt whose config.yaml says something else."""
    cell, run = CELLS[name], tmp_path / "tiny"
    shutil.copytree(exported / "tiny", run)
    if name == "moved":
        change_settings(run, lambda settings: settings["data"].update(path=str(tmp_path / "gone")))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for text in cell.overrides:
        key, _, value = text.partition("=")
        section, leaf = key.split(".")
        settings[section][leaf] = yaml.safe_load(filled(value, places))
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = [
        json.loads(mmscale("eval", one, "--routing", "causal", "--batches", "2", "--json").out)
        for one in (run, exported / "tiny")
    ]
    assert found[0]["loss"] == found[1]["loss"]
    drawn = []
    for number, one in enumerate((run, exported / "tiny")):
        out = tmp_path / f"drawn{number}"
        sampled = mmscale("sample", one, "--prompt", "a", "--count", "1", "--seed", "3", "--out", out)
        assert sampled.status == 0, sampled
        drawn.append((sampled.out.replace(str(out), "OUT"), [file.read_bytes() for file in sorted(out.glob("0*.png"))]))
    assert drawn[0] == drawn[1]
    ended = mmscale("convert", "to-hf", run, tmp_path / "hf")
    assert ended.status == 0, ended
    one, other = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", exported / "tiny-hf")
    )
    for content in (one, other):
        content.get("mmscale", {}).get("config", {}).pop("data", None)  # where it lay
    assert one == other
