"""Every stage of the table under every fault that the trainer knows: it ends with the numbers of an undisturbed one.

A new stage is tested here as soon as it is in the table; only its settings are to be added.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import signal
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.resilience import watchdog
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from mmscale.train.stages.table import MAIN, STAGES
from mmscale.train.steps.router_step import RouterStepper
from mmscale.train.steps.step import Stepper
from tests.end_to_end.lives import Life
from tests.end_to_end.running import mmscale

STEPS = 12
# Steps, and saves of every second one, as each stage names them.
SETTINGS = {
    MAIN: ("checkpoint.every=2",),
    "auxiliary": (f"auxiliary.steps={STEPS}", "auxiliary.checkpoint_every=2", "auxiliary.calibration_batches=2"),
    "sft": (f"sft.steps={STEPS}", "sft.checkpoint_every=2", "sft.optim.lr=1e-3"),
}
STEPPERS: dict[str, type[Any]] = {MAIN: Stepper, "auxiliary": RouterStepper, "sft": Stepper}
SHARED = (f"train.steps={STEPS}", "train.eval_every=0", "train.dry_run=false", "checkpoint.keep=3", "parallel.ep=1")
EXACT = ("loss", "grad_norm", "lr", "tokens", "output_norm")


def test_every_stage_is_tested() -> None:
    assert SETTINGS.keys() == STEPPERS.keys() == STAGES.keys()


@dataclass
class Course:
    """One run of a stage, in as many attempts as it takes."""

    stage: str
    arguments: list[str]
    run: Path

    @property
    def folder(self) -> Path:
        return STAGES[self.stage].folder(self.run)

    @property
    def store(self) -> Store:
        return Store.of_run(self.folder)

    def live(self, faults: str = "", *overrides: str) -> Life:
        """One attempt."""
        life = Life([*self.arguments, *overrides], faults=faults)
        life.end()
        assert life.left_behind() == [] or any("memory" in text for text in overrides)
        return life

    def finish(self, *overrides: str) -> dict[int, dict[str, Any]]:
        """The last attempt; what every step gave."""
        life = self.live("", *overrides)
        assert life.statuses == {0: 0, 1: 0}, life.said
        assert self.store.steps()[-1] == STEPS and integrity.verify(self.store.path(STEPS)) == []
        if self.stage == "auxiliary":
            assert json.loads((self.folder / "report.json").read_text())["step"] == STEPS
        return {line["step"]: {key: line.get(key) for key in EXACT} for line in read_metrics(self.folder)}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if event["event"] == name]


@dataclass
class Courses:
    """Makes runs of a stage, each with the main run that it needs."""

    config: Path
    data: Path
    main: Path
    stage: str

    def course(self, place: Path) -> Course:
        if self.stage != MAIN:
            shutil.copytree(self.main, place / "tiny")
        command = ["train", str(self.config), f"run.dir={place}", f"sft.path={self.data}", "--stage", self.stage]
        return Course(self.stage, [*command, *SHARED, *SETTINGS[self.stage]], place / "tiny")


@pytest.fixture(scope="module")
def main_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished main run."""
    runs = tmp_path_factory.mktemp("main")
    ended = mmscale("train", config, f"run.dir={runs}", *SHARED, "checkpoint.asynchronous=false", nproc=2)
    assert ended.status == 0, ended
    return runs / "tiny"


# The stage of conversations is the main one's code with other data; test_sft trains and resumes it.
ROWS = [pytest.param(stage, marks=pytest.mark.long) if stage == "sft" else stage for stage in STAGES]


@pytest.fixture(scope="module", params=ROWS)
def courses(request: pytest.FixtureRequest, config: Path, digits: Path, main_run: Path) -> Courses:
    return Courses(config, digits, main_run, request.param)


@pytest.fixture(scope="module")
def undisturbed(courses: Courses, tmp_path_factory: pytest.TempPathFactory) -> tuple[Course, dict[int, dict[str, Any]]]:
    """A run that nobody disturbs, with TensorBoard, a profile, and early saves in the main stage."""
    course = courses.course(tmp_path_factory.mktemp("undisturbed"))
    profile = "log.profile={start: 3, steps: 2, ranks: [1]}"
    numbers = course.finish("log.tensorboard=true", profile, "checkpoint.early=4")
    assert sorted(numbers) == list(range(1, STEPS + 1))
    return course, numbers


Undisturbed = tuple[Course, dict[int, dict[str, Any]]]


def test_sinks_saves_and_figures(undisturbed: Undisturbed) -> None:
    """TensorBoard has the figures; saves are asynchronous; tokens per second count no padding and no save."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    course, numbers = undisturbed
    shown = EventAccumulator(str(course.folder / "tensorboard"))
    shown.Reload()
    drawn = {event.step: event.value for event in shown.Scalars("loss")}
    assert drawn == pytest.approx({step: values["loss"] for step, values in numbers.items()}, rel=1e-6)
    committed = course.events("save_committed")
    assert [event["step"] for event in committed][-1] == STEPS and all("blocked_s" in event for event in committed)
    lines = read_metrics(course.folder)
    for before, line in pairwise(lines):
        trained = line["tokens"] - before["tokens"]
        assert line["tokens_per_second"] * line["step_time_s"] == pytest.approx(trained, rel=1e-6)


def test_profile_and_early_saves(undisturbed: Undisturbed) -> None:
    """Steps 3 and 4 of rank 1 only; the numbers of all others equal those without a profile (tests below)."""
    course, _ = undisturbed
    (trace,) = (course.folder / "profile").iterdir()
    assert trace.name == "attempt_1_rank_1_steps_3-4.json.gz"
    named = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert {name for name in named if name.startswith("step ")} == {"step 3", "step 4"}
    assert any("mm" in name for name in named)
    (told,) = course.events("profile")
    assert (told["first"], told["step"], told["ranks"]) == (3, 4, [1])
    assert [line["step"] for line in read_metrics(course.folder) if "profile_s" in line] == [5]  # a pause of rank 0 too
    early = {1, 2, 4} if course.stage == MAIN else set()
    assert set(course.store.steps()) >= early and (1 in course.store.steps()) == (course.stage == MAIN)


@pytest.mark.long
def test_killed_stopped_and_refused_its_storage(courses: Courses, undisturbed: Undisturbed, tmp_path: Path) -> None:
    course = courses.course(tmp_path)
    life = course.live("1:5:step:kill")
    assert life.statuses[1] == -signal.SIGKILL and life.statuses[0] not in (0, 75), life.said
    life = course.live("0:7:step:term")
    assert life.statuses == {0: 75, 1: 75}, life.said
    last = read_events(course.folder)[-2:]
    assert [(event["event"], event["step"]) for event in last] == [("save_committed", 7), ("stop", 7)]
    assert last[1]["signal"] == "SIGTERM"
    life = course.live("1:*:write:ENOSPC", "checkpoint.max_failures=1")
    assert life.statuses == {0: 74, 1: 74} and "No space left on device" in life.said, life.said
    assert course.finish() == undisturbed[1]
    # The first may have been killed before any save was committed, on a busy machine.
    assert [event["step"] for event in course.events("resume")][-2:] == [7, 7]


@pytest.mark.long
def test_a_rank_that_hangs_is_named(courses: Courses, undisturbed: Undisturbed, tmp_path: Path) -> None:
    # With the watch's own grace: ranks look once a second, and the one that waits must have reported too.
    course = courses.course(tmp_path)
    life = course.live("1:5:step:hang", "resilience.hang_timeout=8s")
    assert watchdog.HUNG in life.statuses.values() and not {0, 75} & set(life.statuses.values()), life.said
    found = watchdog.reports(course.folder / "logs" / "attempt_1")
    assert watchdog.culprits(found, world_size=2) == [1] and max(report.step for report in found) >= 4
    assert course.finish() == undisturbed[1]


@pytest.mark.long
def test_a_gradient_that_is_not_finite_is_left_out(
    courses: Courses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, so it is no fault of hardware: nothing of it is applied, the step is taken with the next batch."""
    stepper, calls = STEPPERS[courses.stage], [0]
    accumulate = stepper.accumulate

    def poisoned(self: Any, batches: Any) -> torch.Tensor:
        sums: torch.Tensor = accumulate(self, batches)
        calls[0] += 1
        if calls[0] in (5, 6):
            for module in self.modules:
                for parameter in module.parameters():
                    if hasattr(parameter, "main_grad"):
                        parameter.main_grad.fill_(math.nan)
        return sums

    monkeypatch.setattr(stepper, "accumulate", poisoned)
    course = courses.course(tmp_path)
    numbers = course.finish()
    (skip,) = course.events("skip")
    assert skip["step"] == 5 and skip["grad_norm"] == "nan"
    assert skip["sequences"][1] - skip["sequences"][0] == 4
    assert sorted(numbers) == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in numbers.values())
    assert read_metrics(course.folder)[-1]["anomalies/skip"] == 1


@pytest.mark.long
def test_stopped_within_an_evaluation(courses: Courses, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A request is heard between two batches; the next start evaluates, and is stopped in it too."""
    course = courses.course(tmp_path)
    for asked in (0, 1):
        life = course.live(f"{asked}:{STEPS}:eval:usr2")
        assert life.statuses == {0: 75, 1: 75}, life.said
        assert course.store.steps()[-1] == STEPS and held_out(course) == {}
    assert course.finish() == undisturbed[1]
    assert held_out(course) == held_out(undisturbed[0]) != {}
    assert read_events(course.folder)[-1]["event"] == "finish"


def held_out(course: Course) -> dict[str, Any]:
    """What the evaluation after the last step gave."""
    if course.stage != "auxiliary":
        last = read_metrics(course.folder)[-1]
        return {key: value for key, value in last.items() if key.startswith("eval/")}
    report = course.folder / "report.json"
    return dict(json.loads(report.read_text())["held_out"]) if report.exists() else {}


@pytest.mark.exhaustive
def test_killed_behind_the_last_step(courses: Courses, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """In its evaluation, which follows the last save in some stages: the next start makes up for it."""
    course = courses.course(tmp_path)
    life = course.live(f"0:{STEPS}:eval:kill")
    assert life.statuses[0] == -signal.SIGKILL, life.said
    assert course.finish() == undisturbed[1]


@pytest.mark.exhaustive
def test_memory_is_newer_than_the_disk(courses: Courses, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A rank is killed in the middle, then all when the last save begins: the end is the same, and is saved."""
    memory = (
        "resilience.memory_every=1",
        "checkpoint.every=0",
        "auxiliary.checkpoint_every=0",
        "sft.checkpoint_every=0",
    )
    course = courses.course(tmp_path)
    assert course.live("1:6:step:kill", *memory).statuses[1] == -signal.SIGKILL
    life = course.live(f"*:{STEPS}:save:kill", *memory)
    assert set(life.statuses.values()) == {-signal.SIGKILL}, life.said
    assert course.store.steps() == []
    assert course.finish(*memory) == undisturbed[1]
    first, second = course.events("memory_restored")
    assert 0 < first["step"] < 6 <= second["step"]  # copies are made beside the training
