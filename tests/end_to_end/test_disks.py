"""A disk that is full, read-only or frozen for a while ends and stops nothing: real disks, a whole run and a launch.

The outage is over when ranks have trained some more steps. Then every record is there, with what happened, and the
losses are those of an undisturbed run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch.rank_processes
from launch.status import status
from mmscale.checkpoint.layout import Store
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from mmscale.runtime import disk_writer
from mmscale.runtime.disk_writer import GOOD, REFUSED
from tests.end_to_end import lives
from tests.end_to_end.disks import KINDS, Disk, disk_of
from tests.end_to_end.lives import Life
from tests.end_to_end.test_train import EXACT

STEPS, BEGIN, MORE = 24, 4, 6
SLOW = "*:*:step:slow=0.05"  # of a step, so that the disk changes between two of them
SETTINGS = (f"train.steps={STEPS}", "train.eval_every=12", "train.dry_run=false", "checkpoint.every=6")
SETTINGS += ("checkpoint.max_failures=99", "log.layers_every=2")


Numbers = dict[int, dict[str, Any]]
References = Callable[[int], Numbers]


def numbers(run: Path) -> Numbers:
    """What every step gave."""
    return {line["step"]: {key: line.get(key) for key in EXACT} for line in read_metrics(run)}


@pytest.fixture(scope="module")
def references(config: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """The numbers of an undisturbed run of so many ranks."""

    @functools.cache
    def reference(ranks: int) -> Numbers:
        runs = tmp_path_factory.mktemp("undisturbed")
        life = Life(["train", str(config), f"run.dir={runs}", *SETTINGS, f"parallel.ep={ranks}"], nproc=ranks)
        assert set(life.end().values()) == {0}, life.said
        return numbers(runs / "tiny")

    return reference


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes have these too."""
    monkeypatch.setattr(disk_writer, "WAIT_S", 0.5)
    monkeypatch.setattr(disk_writer, "RETRY_S", 0.1)
    monkeypatch.setattr(launch.rank_processes, "_PROGRESS_S", 0.05)


def shown(life: Life) -> int:
    """The last step that rank 0 printed."""
    file = life._folder / "0.err"
    steps = re.findall(rf"step +(\d+)/{STEPS}", file.read_text() if file.exists() else "")
    return int(steps[-1]) if steps else 0


def disturb(life: Life, disk: Disk) -> None:
    """The disk refuses within the run, until ranks have trained on."""
    life.until(lambda: shown(life) >= BEGIN)
    disk.refuse()
    at = shown(life)
    life.until(lambda: shown(life) >= at + MORE)
    assert at + MORE < STEPS and life.poll(), life.end()
    disk.recover()


def assert_nothing_is_lost(run: Path, disk: Disk, reference: Numbers) -> None:
    """Losses as undisturbed; the outage is on record, and so is what was trained in it."""
    assert numbers(run) == reference
    during = [line["step"] for line in read_metrics(run) if disk.refused < line["time"] < disk.good]
    assert len(during) >= MORE - 2
    told = [event for event in read_events(run) if event["event"] in (REFUSED, GOOD)]
    assert [event["event"] for event in told] == [REFUSED, GOOD], told
    reason = {"full": "No space left", "read-only": "Read-only file system", "frozen": "no answer"}[disk.kind]
    assert reason in told[0]["reason"] and told[1]["kept"] >= MORE - 2 and told[1]["lost"] == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_run_goes_on(kind: str, config: Path, references: References, tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", kind) as disk:
        arguments = ["train", str(config), f"run.dir={disk.folder}", *SETTINGS, "log.tensorboard=true"]
        life = Life(arguments, faults=SLOW)
        disturb(life, disk)
        assert life.end() == {0: 0, 1: 0}, life.said
        run = disk.folder / "tiny"
        assert_nothing_is_lost(run, disk, references(2))
        assert life.said.count("cannot be written:") == 1 and life.said.count("can be written again") == 1
        assert "Traceback" not in life.said
        assert scalars(run / "tensorboard", "loss") == list(range(1, STEPS + 1))


def scalars(folder: Path, name: str) -> list[int]:
    """Steps that TensorBoard has a figure of."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars(name)]


@pytest.mark.long
def test_a_renamed_run_is_saved_where_it_is(config: Path, references: References, tmp_path: Path) -> None:
    """It ends at the next step, with nothing left at the old place, and goes on from the new one."""
    arguments = ["train", str(config), f"run.dir={tmp_path}", *SETTINGS, "log.tensorboard=true"]
    life = Life(arguments, faults=f"{SLOW},1:{BEGIN + 2}:write:slow=0.5")
    life.until(lambda: shown(life) >= BEGIN)
    (tmp_path / "tiny").rename(tmp_path / "moved")
    assert life.end() == {0: 5, 1: 5}, life.said
    run = tmp_path / "moved"
    assert [entry.name for entry in tmp_path.iterdir()] == ["moved"]
    (moved,) = [event for event in read_events(run) if event["event"] == "run_moved"]
    assert moved["to"] == str(run) and Store.of_run(run).steps()[-1] == moved["step"]
    assert f"was renamed to {run}; step {moved['step']} is saved there" in life.said
    assert f"rename it back, or continue with run.dir={tmp_path} run.name=moved" in life.said
    life = Life([*arguments, "run.name=moved"])
    assert life.end() == {0: 0, 1: 0}, life.said
    assert numbers(run) == references(2)


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        pytest.param("full", 2, marks=pytest.mark.long),
        pytest.param("frozen", 2, marks=pytest.mark.exhaustive),
        # A rank's log is open for writing for as long as it lives, so only rank 0, which prints, can be there.
        pytest.param("read-only", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_launched_run_goes_on(
    kind: str,
    ranks: int,
    config: Path,
    references: References,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor notes progress meanwhile, and the run is not called RUNNING when it is over."""
    monkeypatch.setattr(lives, "PATIENCE_S", 300.0)  # three processes import torch, one after the other
    with disk_of(tmp_path / "disk", kind) as disk:
        arguments = ["launch", str(config), "--cluster", "local", f"run.dir={disk.folder}", *SETTINGS]
        life = Life([*arguments, f"parallel.ep={ranks}"], nproc=1, faults=SLOW)
        disturb(life, disk)
        assert life.end() == {0: 0}, life.said
        run = disk.folder / "tiny"
        assert numbers(run) == references(ranks)
        told = [event["event"] for event in read_events(run) if event["event"] in (REFUSED, GOOD)]
        assert told.count(REFUSED) == told.count(GOOD) >= 1  # by rank 0, and by the supervisor
        assert "Traceback" not in life.said
        (found,) = status([run])
        assert (found["state"], found["ended"], found["step"]) == ("finished", True, STEPS)
