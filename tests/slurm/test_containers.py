"""Ranks and node checks in an image: pyxis' arguments by a shim of srun, apptainer's by the real one where it is."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import scheduler
from tests.slurm import pyxis_shim
from tests.slurm.jobs import ROOT, Jobs, Run, assert_equal
from tests.slurm.stub_rank import ENVIRONMENT

pytestmark = pytest.mark.long

_APPTAINER = ROOT / ".venv" / "apptainer" / "bin"  # made by `make apptainer`
HIDDEN = Path("/var/lib")  # of the host, and in no image here
RUNTIMES = {"pyxis": [], "apptainer": ["--userns"]}  # and options: root here has not all capabilities


@dataclass(frozen=True)
class Image:
    """A folder that is the image.

    Attributes:
        root: its own files: a name, and a Python that notes where it ran.
        settings: of the profile.
        uses: what its Python was started with, one a line.
    """

    root: Path
    settings: dict[str, Any]
    uses: Path


@pytest.fixture(params=RUNTIMES)
def image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    runtime = request.param
    if os.getuid() != 0:
        pytest.skip("the shim of pyxis needs root, and so do these nodes")
    if runtime == "pyxis":
        pyxis_shim.install(tmp_path / "bin")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    elif shutil.which("apptainer", path=f"{_APPTAINER}:{os.environ['PATH']}") is None:
        pytest.skip("no apptainer: make apptainer")
    else:
        monkeypatch.setenv("PATH", f"{_APPTAINER}:{os.environ['PATH']}")
    return make_image(tmp_path, runtime, monkeypatch)


def make_image(folder: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> Image:
    root, notes = folder / "image", folder / "notes"
    notes.mkdir()
    for name in ("usr", "etc", "proc", "dev", "sys", "tmp", "run", "root", "opt", "var/tmp", "home"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    python = root / "opt" / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {notes}/uses\n'
        "export IN_IMAGE=yes\n"
        f"[ -e {HIDDEN} ] && export SEES_HIDDEN=yes\n"
        f'[ "$2" = mmscale ] && [ -n "$MMSCALE_STUB" ] && exec {sys.executable} {ROOT}/tests/slurm/stub_rank.py "$@"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    # The checkout is there for the packages and the stub; Python imports our code from the snapshot.
    readable = list(dict.fromkeys(["/usr", sys.base_prefix, sys.prefix, str(ROOT)]))
    # a .venv may borrow packages of another one
    readable += [p for p in sys.path if Path(p).is_dir() and not any(Path(p).is_relative_to(one) for one in readable)]
    settings = {
        "image": str(root),
        "runtime": runtime,
        "python": "/opt/python",
        "mounts": [*(f"{path}:{path}:ro" for path in readable), str(notes)],
        "options": RUNTIMES[runtime],
    }
    monkeypatch.setenv("PYTHONPATH", "/of/the/host")
    (folder / "from_here").mkdir()
    monkeypatch.chdir(folder / "from_here")
    return Image(root, settings, notes / "uses")


def with_image(jobs: Jobs, image: Image, /, **settings: Any) -> Jobs:
    """The same jobs, in the image."""
    data = yaml.safe_load(jobs.config.read_text())["data"]["path"]
    container = image.settings | settings
    container["mounts"] = [*container["mounts"], f"{data}:{data}:ro"]
    profile = jobs.folder / "profile.yaml"
    profile.write_text(
        yaml.safe_dump(yaml.safe_load(jobs.profile.read_text()) | {"container": container, "keep": ["MMSCALE_STUB"]})
    )
    return dataclasses.replace(jobs, profile=profile, runs=jobs.runs)


def job_log(run: Run) -> str:
    return next(run.folder.glob("launch/001/submitit/*_log.out")).read_text()


def test_ranks_and_node_checks_run_in_the_image(jobs: Jobs, image: Image) -> None:
    """Until it is requeued after a save, and again: signals pass through the runtime."""
    run = with_image(jobs, image).launch("train.steps=60", slow_s=0.1, stub=True, environment={"MMSCALE_STUB": "1"})
    run.until_step(5)
    scheduler.cancel(run.job, signal="USR2", batch_only=True)
    run.until(lambda: run.state().restarts == 1, "it is requeued")
    assert run.until_ended().state == "COMPLETED", run.report()
    seen = json.loads((run.folder / ENVIRONMENT).read_text())
    assert HIDDEN.exists()
    assert seen["IN_IMAGE"] == "yes" and "SEES_HIDDEN" not in seen
    assert seen["PYTHONPATH"] == str(run.folder / "launch" / "001" / "code.zip")
    assert seen["PYTHONNOUSERSITE"] == "1"
    started = [line.split()[1] for line in image.uses.read_text().splitlines()]
    assert {name: started.count(name) for name in set(started)} == {"slurm.preflight": 4, "mmscale": 4}
    assert [event["action"] for event in run.events("ranks_ended")] == ["requeue", "end"]
    resumes = run.events("resume")
    assert resumes and resumes[0]["step"] >= 5  # the save came through


def test_an_image_that_is_not_there_is_told_with_all_that_the_runtime_said(jobs: Jobs, image: Image) -> None:
    """On another file system than the launching machine's; here the folder around it is not there either."""
    asked = with_image(jobs, image, image="/nowhere/else/image.sqsh")
    run = asked.launch("train.steps=5", stub=True)
    assert run.until_ended().exit_status == 1, run.report()
    log = job_log(run)
    (event,) = run.events("preflight_failed")
    for text in event["nodes"].values():
        assert "no answer: " in text and "/nowhere/else/image.sqsh" in text
    if image.settings["runtime"] == "pyxis":
        assert log.count("container start failed with error code: 1") == 2  # and so on: the whole of it, of each node
    assert "is not cordoned: all nodes of the job have a problem" in log
    assert not run.events("launch")


def test_a_python_without_packages_is_told_before_ranks_start(jobs: Jobs, image: Image) -> None:
    bare = image.root / "opt" / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    bare.chmod(0o755)
    run = with_image(jobs, image, python="/opt/bare").launch("train.steps=5", nodes=1, stub=True)
    assert run.until_ended().exit_status == 1, run.report()
    (event,) = run.events("preflight_failed")
    (text,) = event["nodes"].values()
    assert "has no torch, megatron, numpy" in text
    assert "is not cordoned" in job_log(run)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", ["srun", "torchrun"])
def test_training_in_the_image_gives_the_same_numbers(
    jobs: Jobs, image: Image, ranks: str, reference: list[dict[str, Any]]
) -> None:
    asked = with_image(jobs, image)
    profile = yaml.safe_load(asked.profile.read_text()) | {"ranks": ranks}
    asked.profile.write_text(yaml.safe_dump(profile))
    run = asked.launch()
    assert run.until_ended().state == "COMPLETED", run.report()
    assert_equal(run, reference)
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["code"] == str(run.folder / "launch" / "001" / "code.zip")
