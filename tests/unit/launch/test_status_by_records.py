"""What `mmscale status` finds in records alone: the step, the goodput, stages, folders of other users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import control, status
from launch import record as records
from launch.scheduler import JobState
from mmscale.checkpoint.layout import Store
from mmscale.errors import LaunchError
from mmscale.resilience import generations, run_lock, snapshot_files
from mmscale.resilience.generations import Generation
from mmscale.resilience.snapshot_files import Marker
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.test_status import START, happened, launched, shown


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that all can read, and for root another user, who may not read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    os.seteuid(os.getuid())
    shutil.rmtree(folder)


def test_another_users_folder_is_said_to_be_one(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSlurm(nobody / "bin", **{"8": JobState("8", "RUNNING")})
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    theirs, mine = (
        launched(nobody / name, records.JobKey(number)) for name, number in (("theirs", "7"), ("mine", "8"))
    )
    closed = theirs / "launch" / "001"
    closed.chmod(0)
    if os.getuid() == 0:
        fake.open_to_all()
        os.seteuid(65534)
    one, other = status.status([theirs, mine])
    assert one["state"] == "unreadable" and f"no permission to read {closed}" in one["reason"]
    assert "chmod" in one["reason"] and other["state"] == "RUNNING"
    assert status.known(nobody)[-2:] == [mine, theirs]
    with pytest.raises(LaunchError, match="no permission to read"):
        status.status([theirs])


@pytest.mark.parametrize(
    ("attempt", "logged", "end", "step"),
    [(1, 70, 78, 78), (1, 78, 78, 78), (2, 70, 78, 70), (0, 150, 110, 110)],
    ids=["stopped after the last logged step", "at it", "an attempt after it has logged", "rolled back before it"],
)
def test_the_step_is_the_one_that_was_saved_and_not_only_the_last_logged_one(
    tmp_path: Path, attempt: int, logged: int, end: int, step: int
) -> None:
    run = tmp_path / "run"
    happened(run, START, ("stop", {"step": end}))
    (run / "config.yaml").write_text("train: {steps: 300}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": logged, "attempt": attempt, "loss": 1.0}) + "\n")
    assert (shown(run)["step"], shown(run)["steps"]) == (step, 300)


def ended(run: Path, *, saved: int, end: tuple[str, dict[str, Any]] | None = None) -> Path:
    """A local run that began 10 s after its process and did 20 steps in 20 s, with a checkpoint of step `saved`."""
    now = time.time()
    run.mkdir()
    if saved:
        Store.of_run(run).path(saved).mkdir(parents=True)
    begun = {"time": now - 1000, "attempt": 1, "event": "start", "step": 0, "since": now - 1010}
    events = [begun] + ([{"time": now - 980, "attempt": 1, "event": end[0], **end[1]}] if end else [])
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    last = {"step": 20, "attempt": 1, "loss": 1.0, "step_time_s": 1.0, "time": now - 980}
    first = last | {"step": 1, "time": now - 999}
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (first, last)))
    return run


@pytest.mark.parametrize(
    ("end", "saved"),
    [(("finish", {"step": 20}), 20), (None, 20), (None, 5), (None, 0)],
    ids=["finished", "killed after a save", "killed 15 steps after it", "killed before any"],
)
def test_the_goodput_of_a_local_run_does_not_shrink_after_its_end(
    tmp_path: Path, end: tuple[str, dict[str, Any]] | None, saved: int
) -> None:
    """Without a launcher nothing records the end of a killed process: the last written line counts, up to the save."""
    found = shown(ended(tmp_path / "run", saved=saved, end=end))
    assert found["goodput"] == pytest.approx(saved / 30, abs=0.01)
    assert [found["time"][part] for part in ("start_up", "steps", "lost")] == [10.0, saved, 20.0 - saved]


@pytest.fixture
def memory() -> Iterator[list[Path]]:
    """Two private folders in shared memory."""
    made = [snapshot_files.create_folder() for _ in range(2)]
    yield made
    for folder in made:
        snapshot_files.remove_folder(folder)


def held(run: Path, folders: Sequence[Path], *, step: int) -> None:
    """Both ranks, of one parity group, have committed a snapshot."""
    names = tuple(folder.name for folder in folders)
    generations.write_index(run, [Generation("g", 1, {}, ((0, 1),), names)])
    for rank, folder in enumerate(folders):
        marker = Marker("g", 1, 1, step, rank, (0, 1), (8, 8), ("a", "b"), "c")
        snapshot_files.commit(folder, 0, marker)


@pytest.mark.parametrize(
    ("step", "gone", "counted"),
    [(18, 0, 18), (18, 1, 18), (18, 2, 5), (4, 0, 5)],
    ids=["of both ranks", "of one, which parity rebuilds", "of none", "older than the checkpoint"],
)
def test_steps_that_are_held_in_memory_are_not_lost(
    tmp_path: Path, memory: list[Path], step: int, gone: int, counted: int
) -> None:
    """The next start would resume from the snapshot, and not repeat them."""
    run = ended(tmp_path / "run", saved=5)
    held(run, memory, step=step)
    for folder in memory[:gone]:
        snapshot_files.remove_folder(folder)
    found = shown(run)
    assert [found["time"][part] for part in ("steps", "lost")] == [counted, 20.0 - counted]
    assert found["last_checkpoint"] == 5


def test_resume_of_a_run_that_train_started_says_how_it_goes_on(tmp_path: Path) -> None:
    """`status`, `logs` and `stop` know such a run, so "never launched" alone would send its user to a cluster."""
    run = tmp_path / "run"
    with run_lock.RunLock(run, by="train") as lock:
        lock.acquire("train-1", attempt=1)
    with pytest.raises(LaunchError, match="was started by `mmscale train`") as refused:
        control.resume(run)
    assert "start the same `mmscale train` again" in refused.value.remedy
    (run / "lease.json").unlink()
    with pytest.raises(LaunchError, match="was never launched"):
        control.resume(run)


def killed(run: Path, *, config: str = "", **began: Any) -> Path:
    """A run of `mmscale train` whose process was killed: its lease names a process that is gone."""
    run.mkdir(parents=True)
    holder = "import os, pathlib; from mmscale.resilience.run_lock import RunLock\n"
    holder += f"lock = RunLock(pathlib.Path({str(run)!r}), by='train')\n"
    holder += "lock.acquire('train-1', attempt=1); os._exit(0)"
    subprocess.run([sys.executable, "-c", holder], check=True)
    happened(run, ("start", {"step": 0, "world_size": 1, **began}))
    if config:
        (run / "config.yaml").write_text(config)
    return run


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_remedy_of_a_killed_local_run_is_the_command_that_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Not `mmscale resume`, which refuses the run; the command must name the same folder from here."""
    monkeypatch.chdir(tmp_path)
    run = killed(Path("runs/my orph"), config="run: {dir: runs, name: my orph}\n", world_size=ranks)
    command = "`mmscale train 'runs/my orph/config.yaml'" + (" --nproc 2`" if ranks == 2 else "`")
    for action, cause in ((control.stop, "is gone"), (control.resume, "was started by `mmscale train`")):
        with pytest.raises(LaunchError, match=cause) as refused:
            action(run)
        assert command in refused.value.remedy and "mmscale resume" not in refused.value.remedy
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(LaunchError) as refused:
        control.stop(Path("../runs/my orph"))
    assert "in the folder where it was started" in refused.value.remedy and "config.yaml" not in refused.value.remedy


@pytest.mark.parametrize(("by", "name"), [("torchrun", "torchrun"), ("slurm", "SLURM"), ("mpi", "mpirun")])
@pytest.mark.parametrize("stage", ["", "sft"])
def test_the_remedy_of_ranks_of_another_launcher_names_it(
    by: str, name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have been on several nodes; a single process of SLURM is one too."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/own")
    place = killed(run / stage, config="run: {dir: runs, name: own}\n", world_size=16, ranks_by=by)
    (run / "config.yaml").write_text("run: {dir: runs, name: own}\n")
    with pytest.raises(LaunchError) as refused:
        control.stop(place)
    assert f"start the same `mmscale train` again with 16 ranks of {name}" in refused.value.remedy
    assert "--nproc" not in refused.value.remedy and ("--stage sft" in refused.value.remedy) == bool(stage)


def test_the_remedy_of_a_killed_stage_names_the_stage(tmp_path: Path) -> None:
    stage = killed(tmp_path / "run" / "auxiliary")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(LaunchError, match="is gone") as refused:
        control.stop(stage)
    assert "start the same `mmscale train` again, with --stage auxiliary" in refused.value.remedy


def test_a_killed_launch_on_this_machine_is_resumed(tmp_path: Path) -> None:
    run = killed(tmp_path / "run")
    launched(run, records.JobKey(""))
    with pytest.raises(LaunchError, match="is gone") as refused:
        control.stop(run)
    assert refused.value.remedy == f"`mmscale resume {run}`"


def test_stages_of_a_stage_are_listed_after_it(tmp_path: Path) -> None:
    """Causal routers are trained after fine-tuning, in its folder."""
    places = ["run", "run/auxiliary", "run/sft", "run/sft/auxiliary", "sun"]
    for place in places:
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.yaml").write_text("train: {steps: 4}\n")
    assert status.known(tmp_path) == [tmp_path / place for place in places]
