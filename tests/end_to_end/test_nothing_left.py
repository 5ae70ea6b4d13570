"""A run or a stage that is done, started again: one line, before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmscale.checkpoint.mirror.downloads import generations
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.cli import main
from mmscale.runs.events import EventLog
from mmscale.train.stages import table
from tests.end_to_end.running import listing, mmscale

STAGES = {
    "main": ("", "train.steps", 30),
    "auxiliary": ("auxiliary", "auxiliary.steps", 12),
    "sft": ("sft", "sft.steps", 4),
}
STEPS = tuple(f"{setting}={steps}" for _, setting, steps in STAGES.values())


@pytest.fixture(scope="module")
def tuned(config: Path, digits: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which every stage is done."""
    run = Path(shutil.copytree(exported / "tiny", tmp_path_factory.mktemp("tuned") / "tiny"))
    given = (f"run.dir={run.parent}", f"sft.path={digits}", *STEPS, "parallel.ep=1", "checkpoint.asynchronous=false")
    ended = mmscale("train", config, *given, "--stage", "sft")
    assert ended.status == 0, ended
    return run


def test_every_stage_is_tested() -> None:
    assert set(STAGES) == set(table.STAGES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", [("train",), ("train", "--nproc", "2"), ("launch",)], ids=" ".join)
def test_a_start_of_what_is_done_loads_and_writes_nothing(
    config: Path,
    digits: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    command: tuple[str, ...],
) -> None:
    """With other settings too, which would ask for a confirmation."""
    subfolder, setting, steps = STAGES[stage]
    run = Path(shutil.copytree(tuned, tmp_path / "tiny"))
    before = listing(run)
    ep = f"parallel.ep={2 if '--nproc' in command else 1}"
    given = [f"run.dir={tmp_path}", *STEPS, f"sft.path={digits}", ep, "log.every=7"]
    arguments = [command[0], str(config), *given, "--stage", stage, *command[1:], "--json"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    done = f"is done: {steps} of {steps} steps; nothing is left to train; raise {setting} to go on, e.g. {setting}="
    found = json.loads(said.out)
    line = found[0]["done"] if command == ("launch",) else said.err.strip()
    assert line == f"{run / subfolder} {done}{2 * steps}"
    assert listing(run) == before


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_that_the_mirror_lacks_is_work_that_is_left(
    stage: str, config: Path, digits: Path, tuned: Path, tmp_path: Path
) -> None:
    """It is made, nothing is trained, and the status is that of a run that is done; then the same once more."""
    subfolder, _, steps = STAGES[stage]
    run = Path(shutil.copytree(tuned, tmp_path / "tiny"))
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror"
    given = (f"run.dir={tmp_path}", *STEPS, f"sft.path={digits}", "parallel.ep=1", mirror, "--stage", stage, "--json")
    for _ in range(2):
        trained = (run / subfolder / "metrics.jsonl").read_bytes()
        ended = mmscale("train", config, *given)
        assert ended.status == 0, ended
        assert f"{run / subfolder} is done: {steps} of {steps} steps; nothing is left to train; raise" in ended.err
        assert json.loads(ended.out)["exit_status"] == 0 and json.loads(ended.out)["last"]["step"] == steps
        place = tmp_path / "mirror" / "tiny" / subfolder
        assert [one.step for one in generations(Remote(f"file://{place}"))][-1] == steps
        assert (run / subfolder / "metrics.jsonl").read_bytes() == trained
        (shown,) = json.loads(mmscale("status", run / subfolder, "--json").out)
        assert (shown["state"], shown["mirror"]) == ("finished", {"step": steps, "problem": ""})


@pytest.mark.long
def test_a_sweep_trains_what_is_left_of_it(config: Path, tmp_path: Path) -> None:
    """Done runs are no failure, and each run's row says what became of it."""
    given = ("launch", config, "--cluster", "local", f"run.dir={tmp_path}", "parallel.ep=1", "train.eval_every=0")
    sweep = (*given, "train.steps=3", "optim.warmup=1", "--json", "--sweep")
    assert mmscale(*sweep, "run.seed=2").status == 0
    ended = mmscale(*sweep, "run.seed=1,2,3")
    assert ended.status == 0, ended
    rows = json.loads(ended.out)
    assert [Path(one["run"]).name for one in rows] == [f"tiny-seed-{seed}" for seed in (1, 2, 3)]
    assert ["done" in one for one in rows] == [False, True, False]
    assert [one.get("exit_status") for one in rows] == [0, None, 0]
    ended = mmscale(*sweep, "run.seed=1,2,3")
    assert ended.status == 0 and all("3 of 3 steps; nothing is left" in one["done"] for one in json.loads(ended.out))


def test_work_that_follows_the_last_step_is_completed(config: Path, exported: Path, tmp_path: Path) -> None:
    """The routers' report is written after the last save; an attempt that began and did not finish is no end."""
    run = Path(shutil.copytree(exported / "tiny", tmp_path / "tiny"))
    (run / "auxiliary" / "report.json").unlink()
    events = EventLog(run / "auxiliary", 2)
    events.add("resume", step=12)
    events.close()
    given = (f"run.dir={tmp_path}", "train.steps=30", "auxiliary.steps=12", "parallel.ep=1", "--stage", "auxiliary")
    ended = mmscale("train", config, *given, *(f"auxiliary.{name}={value}" for name, value in AUXILIARY.items()))
    assert ended.status == 0, ended
    assert "nothing is left to train" in ended.err and "passes over" not in ended.err
    assert (run / "auxiliary" / "report.json").is_file()


AUXILIARY = {"optim.lr": "1e-2", "calibration_batches": 2}
