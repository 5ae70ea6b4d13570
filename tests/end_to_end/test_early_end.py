"""The best checkpoint is kept and training ends early, in every layout, through stops, resumes and launches.

The learning rate is so small that no weight changes: the first evaluation is the best one, all others equal it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.checkpoint.layout import Store
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.events import EARLY, read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import Ended, mmscale

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ("parallel.ep=1",)),
    "dp": (2, ("parallel.ep=1",)),
    "ep": (2, ("parallel.ep=2",)),
    "tp": (2, ("parallel.tp=2", "parallel.ep=1")),
    "pp": (2, ("parallel.pp=2", "parallel.ep=1")),
    "cp": (2, ("parallel.cp=2", "parallel.ep=2", "data.document_multiple=4")),
}
EVERY, PATIENCE = 2, 3
BEST, END = EVERY, EVERY * (1 + PATIENCE)
STILL = (
    "optim.schedule=constant",
    "optim.lr=1e-30",
    "optim.min_lr=0",
    "optim.warmup=0",
    f"train.eval_every={EVERY}",
    "train.eval_batches=1",
)
SAVES = ("checkpoint.every=3", "checkpoint.keep=1", "checkpoint.keep_best=eval/loss")
SETTINGS = (*STILL, *SAVES, f"train.stop_when={{metric: eval/loss, patience: {PATIENCE}}}")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == name]


def last_step(run: Path) -> int:
    return int(read_metrics(run)[-1]["step"])


def train(config: Path, folder: Path, layout: str, *more: str) -> Ended:
    nproc, settings = LAYOUTS[layout]
    ended = mmscale("train", config, f"run.dir={folder}", *SETTINGS, *settings, *more, nproc=nproc)
    assert ended.status == 0, ended
    return ended


@pytest.fixture(scope="module")
def ended(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two data-parallel ranks that has ended early, to be copied."""
    folder = tmp_path_factory.mktemp("early")
    train(config, folder, "dp")
    return folder / "tiny"


def test_it_ends_and_the_best_checkpoint_is_there(ended: Path) -> None:
    (event,) = events(ended, EARLY)
    assert (event["step"], event["best_step"], event["patience"]) == (END, BEST, PATIENCE)
    assert not events(ended, "finish") and not events(ended, "stop")
    assert last_step(ended) == END
    store = Store.of_run(ended)
    assert store.best() == BEST and {BEST, END} <= set(store.steps())
    assert 3 not in store.steps()  # as good as the best one, and older than those that are kept
    (shown,) = json.loads(mmscale("status", ended, "--json").out)
    assert (shown["state"], shown["ended"]) == ("ended early", True)
    found = json.loads(mmscale("eval", f"{ended}@best", "--batches", "1", "--json").out)
    assert (found["step"], found["loss"]) == (BEST, pytest.approx(event["best"], rel=1e-6))
    listed = json.loads(mmscale("ckpt", "list", ended, "--json").out)
    assert listed["best"] == BEST
    assert mmscale("ckpt", "prune", ended, "--keep", "2").status == 0
    assert BEST in store.steps()


HOOK = """
from mmscale.extend import TrainingHook

class Heard(TrainingHook):
    def __init__(self, run, *, file):
        self.file = file

    def hear(self, *what):
        with open(self.file, "a") as file:
            print(*what, file=file)

    def on_start(self, step):
        self.hear("start", step)

    def on_save(self, step):
        self.hear("save", step)

    def on_end(self, step, *, finished):
        self.hear("end", step, finished)
"""


@pytest.mark.long
def test_the_last_evaluation_is_made_by_a_later_attempt(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one that ends the run early: that is saved and recorded, and hooks hear all of it."""
    (tmp_path / "heard_moma.py").write_text(HOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    heard = tmp_path / "heard.txt"
    hook = f"train.hooks={{'heard_moma:Heard': {{file: {heard}}}}}"
    monkeypatch.setenv(VARIABLE, f"0:{END}:eval:usr2")
    run = tmp_path / "tiny"
    cut = mmscale("train", config, f"run.dir={tmp_path}", *SETTINGS, *LAYOUTS["one"][1], hook)
    assert cut.status == 75 and heard.read_text().splitlines()[-2:] == [f"save {END}", f"end {END} False"]
    assert not events(run, EARLY) and Store.of_run(run).steps()[-1] == END
    monkeypatch.delenv(VARIABLE)
    heard.unlink()
    train(config, tmp_path, "one", hook)
    assert heard.read_text().splitlines() == [f"start {END}", f"save {END}", f"end {END} True"]
    assert [event["step"] for event in events(run, EARLY)] == [END] and not events(run, "finish")
    heard.unlink()
    train(config, tmp_path, "one", hook)
    assert not heard.exists(), "nothing is left to do"


@pytest.mark.long
def test_a_state_that_a_later_attempt_finds_best_is_saved_as_the_best(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to stop cuts the evaluation short; the next attempt makes it, and is killed right after."""
    run, settings = tmp_path / "tiny", (f"run.dir={tmp_path}", *STILL, *SAVES, *LAYOUTS["one"][1])
    monkeypatch.setenv(VARIABLE, f"0:{BEST}:eval:usr2")
    assert mmscale("train", config, *settings).status == 75
    assert Store.of_run(run).steps() == [BEST] and Store.of_run(run).best() is None
    monkeypatch.setenv(VARIABLE, f"0:{BEST + 1}:step:kill")
    assert mmscale("train", config, *settings).status < 0
    assert Store.of_run(run).best() == BEST
    monkeypatch.delenv(VARIABLE)
    train(config, tmp_path, "one", f"train.steps={2 * EVERY}", "train.stop_when=null")
    assert Store.of_run(run).best() == BEST and BEST in Store.of_run(run).steps()


def test_it_goes_on_only_if_that_is_changed(ended: Path, config: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ended, tmp_path / "tiny"))
    again = train(config, tmp_path, "dp")
    assert f"{END} of 60 steps, ended early: eval/loss was lowest at step {BEST}" in again.err
    assert "train.stop_when=null" in again.err and last_step(run) == END
    more = f"train.stop_when={{metric: eval/loss, patience: {PATIENCE + 1}}}"
    train(config, tmp_path, "one", more)
    assert [event["step"] for event in events(run, EARLY)] == [END, END + EVERY]
    train(config, tmp_path, "one", "train.stop_when=null", "checkpoint.keep_best=null", f"train.steps={END + 7}")
    assert last_step(run) == END + 7 and events(run, "finish")
    assert Store.of_run(run).best() is None
    stage = ("--stage", "auxiliary", "auxiliary.steps=2", "auxiliary.calibration_batches=0")
    train(config, tmp_path, "one", *stage, f"train.steps={END + 7}")  # the settings are those of the main stage


# Only the last stage of a pipeline has a loss, and with cp only of a part: other layouts have no more to agree on.
@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[] if n in ("pp", "cp") else pytest.mark.exhaustive) for n in LAYOUTS if n != "dp"],
)
@pytest.mark.parametrize("cut", [None, pytest.param(2 * EVERY, marks=pytest.mark.exhaustive)])
def test_all_layouts_end_at_the_same_step(layout: str, cut: int | None, config: Path, tmp_path: Path) -> None:
    """`cut`: the first attempt ends after this step, and the next one goes on counting."""
    if cut is not None:
        train(config, tmp_path, layout, f"train.steps={cut}")
    said = train(config, tmp_path, layout).err
    assert "60 steps = " in said and " passes over " in said and " per parameter" in said
    assert "(first 1 of " in said and "gives the same numbers with --batches 1" in said
    run = tmp_path / "tiny"
    assert [event["step"] for event in events(run, EARLY)] == [END]
    assert all(
        event["extents"][""]["batches"] == 1 < event["extents"][""]["available"] for event in events(run, "start")
    )
    assert Store.of_run(run).best() == BEST and {BEST, END} <= set(Store.of_run(run).steps())


@pytest.mark.long
def test_a_launched_run_is_over(config: Path, tmp_path: Path) -> None:
    """Exit 0, no requeue, no restart."""
    ended = mmscale("launch", config, f"run.dir={tmp_path}", *SETTINGS, "parallel.ep=1", timeout_s=400)
    assert ended.status == 0, ended
    run = tmp_path / "tiny"
    (over,) = events(run, "ranks_ended")
    assert (over["status"], over["action"], over["over"]) == (0, "end", True)
    (shown,) = yaml.safe_load(mmscale("status", run, "--json").out)
    assert (shown["state"], shown["step"], shown["restarts"]) == ("ended early", END, 0)
