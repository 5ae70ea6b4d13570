"""A run or a stage that is done, started again: one line, before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.runs.events import EventLog
from tests.end_to_end.running import listing, mmscale

STAGES = {"main": ("", "train.steps", 30), "auxiliary": ("auxiliary", "auxiliary.steps", 12)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", [("train",), ("train", "--nproc", "2"), ("launch",)], ids=" ".join)
def test_a_start_of_what_is_done_loads_and_writes_nothing(
    config: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    command: tuple[str, ...],
) -> None:
    """With other settings too, which would ask for a confirmation."""
    subfolder, setting, steps = STAGES[stage]
    run = Path(shutil.copytree(exported / "tiny", tmp_path / "tiny"))
    before = listing(run)
    ep = f"parallel.ep={2 if '--nproc' in command else 1}"
    given = [f"run.dir={tmp_path}", "train.steps=30", "auxiliary.steps=12", ep, "log.every=7"]
    arguments = [command[0], str(config), *given, "--stage", stage, *command[1:], "--json"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    done = f"is done: {steps} of {steps} steps; nothing is left to train; raise {setting} to go on, e.g. {setting}="
    found = json.loads(said.out)
    line = found[0]["done"] if command == ("launch",) else said.err.strip()
    assert line == f"{run / subfolder} {done}{2 * steps}"
    assert listing(run) == before


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
