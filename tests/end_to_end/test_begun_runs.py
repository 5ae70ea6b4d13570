"""Runs that begin with weights of `ckpt upcycle` or `ckpt fuse`, with memory tier, mirror, and CP or EP.

test_upcycle.py and test_fuse.py have tensor, pipeline, expert and data parallelism.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.events import read_events
from tests.end_to_end.running import losses, mmscale, ok

pytestmark = pytest.mark.long

STEPS = 4
SOURCE = (
    *(f"train.steps={STEPS}", "optim.warmup=1", "train.eval_every=0", "checkpoint.asynchronous=false"),
    *("model.kind=dense", "model.experts.counts={}", "model.depth=null", "parallel.ep=1", "optim.lr=1e-2"),
    "data.document_multiple=4",
)
# No save comes before the last step.
BEGUN = (f"train.steps={STEPS}", "checkpoint.every=0", "checkpoint.allow_missing=true")


@pytest.fixture(scope="module")
def sources(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` and `image`, dense runs of 4 steps; `fused` and `upcycled`, which have not begun."""
    folder = tmp_path_factory.mktemp("begun")
    for seed, name in enumerate(("text", "image")):
        ok("train", config, f"run.dir={folder}", f"run.name={name}", f"run.seed={seed}", *SOURCE)
    ok("ckpt", "fuse", folder / "text", folder / "image", folder / "fused", "--steps", str(STEPS))
    made = ("--experts", "text=2,image=2", "--steps", str(STEPS))
    ok("ckpt", "upcycle", folder / "text", folder / "upcycled", *made)
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param("fused", marks=pytest.mark.exhaustive), "upcycled"],
)
def begun(sources: Path, request: pytest.FixtureRequest) -> tuple[Path, dict[int, float]]:
    """A run that has not begun, and the losses of one that was not disturbed, from a copy."""
    begun = sources / request.param
    run, command = copied(begun, sources / "whole")
    ok(*command)
    return begun, losses(run)


Begun = tuple[Path, dict[int, float]]


def copied(begun: Path, place: Path) -> tuple[Path, tuple[str | Path, ...]]:
    """A copy of the run, and the command that trains it."""
    run = Path(shutil.copytree(begun, place / begun.name))
    return run, ("train", run / "config.yaml", f"run.dir={place}", *BEGUN)


@pytest.mark.parametrize("layout", ["cp=2", "ep=2"])
def test_layouts_train_alike(layout: str, begun: Begun, tmp_path: Path) -> None:
    run, command = copied(begun[0], tmp_path)
    ended = mmscale(*command, f"parallel.{layout}", nproc=2)
    if layout == "ep=2" and run.name == "fused":
        assert ended.status == 2 and "parallel.ep" in ended.err, ended  # it has no experts
        return
    assert ended.status == 0, ended
    assert losses(run) == pytest.approx(begun[1], rel=1e-5)


def test_it_goes_on_from_memory(begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the checkpoint of step 0 that it began with."""
    run, train = copied(begun[0], tmp_path)
    command = (*train, "resilience.memory_every=1")
    monkeypatch.setenv(VARIABLE, "*:4:step:kill")
    killed = mmscale(*command, nproc=2)
    assert killed.status not in (0, 2), killed
    monkeypatch.delenv(VARIABLE)
    ok(*command, nproc=2)
    (restored,) = [event for event in read_events(run) if event["event"] == "memory_restored"]
    assert restored["step"] >= 2
    assert losses(run) == pytest.approx(begun[1], rel=1e-5)


def test_it_goes_on_elsewhere_from_its_mirror(begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its first save: the mirror has the checkpoint that it began with."""
    run, train = copied(begun[0], tmp_path)
    command = (*train, f"checkpoint.mirror=file://{tmp_path}/mirror")
    monkeypatch.setenv(VARIABLE, "*:3:step:kill")
    killed = mmscale(*command)
    assert killed.status not in (0, 2), killed
    monkeypatch.delenv(VARIABLE)
    assert Store.of_run(run).steps() == [0]
    ok("ckpt", "mirror", run)
    shutil.rmtree(run)
    ok("ckpt", "fetch", f"file://{tmp_path}/mirror/{run.name}", run)
    ok(*command)
    assert losses(run) == pytest.approx(begun[1], rel=1e-6)
