"""Changes since a checkpoint, and how a run or its stage resumes after them: for the matrices of resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import Ended, assert_says


@dataclass(frozen=True)
class Cell:
    """A change.

    Attributes:
        overrides: of the configuration; DATA is replaced by a copy of the data, OTHER by one with other documents.
        asks: text of the error of `train` without `--yes`; "": it resumes.
        says: what it prints when it resumes.
        stage: text of the error of the auxiliary stage; "": it resumes.
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
    "phase": Cell(("optim.phases=[{start: 20, lr: 1e-6}]",), says="optim.phases.0.start: (none) -> 20"),
    "moved": Cell(("data.path=DATA",), says="DATA, the same documents"),
    "replaced": Cell(("data.path=OTHER",), asks="DIGITS is left out; data: OTHER is new", says=ORDER),
}


def filled(text: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        text = text.replace(name, path)
    return text


@dataclass(frozen=True)
class Subject:
    """What is resumed: a run, or its stage.

    Attributes:
        source: name of the finished run, below `exported`.
        folder: its place, below the run's folder.
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


@dataclass
class Course:
    """A subject with a change, independent of how and where it is resumed."""

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
        """Resume it, with `--yes` if that is required; None: it is refused, with or without `--yes`.

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
        """Loss of the step that was taken."""
        return float(read_metrics(place / "tiny" / self.subject.folder)[-1]["loss"])


Courses = Callable[[str, str], Course]
