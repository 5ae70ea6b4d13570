"""Ranks are killed, stopped and refused their storage at every moment, and the run ends with the same numbers.

MMSCALE_KILLS=200 (`make soak`) for more than the 3 random kills of every run of the suite.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import LATEST, Store
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests import shared_memory
from tests.end_to_end.lives import Life
from tests.end_to_end.test_train import EXACT

KILLS = int(os.environ.get("MMSCALE_KILLS", "3"))
STEPS = 24


class Lives:
    """A run of few steps that saves every second one, and the numbers it must end with."""

    def __init__(self, config: Path, runs: Path) -> None:
        self.arguments = ["train", str(config), f"run.dir={runs}", f"train.steps={STEPS}", "train.eval_every=12"]
        self.arguments += ["train.dry_run=false", "checkpoint.every=2", "checkpoint.keep=3"]
        self.run = runs / "tiny"
        self.store = Store.of_run(self.run)

    def begin(self, faults: str = "", *overrides: str) -> Life:
        return Life([*self.arguments, *overrides], faults=faults)

    def finish(self) -> dict[int, dict[str, Any]]:
        """Go on to the end without faults; what every step gave."""
        life = self.begin()
        assert set(life.end().values()) == {0}, life.said
        return self.numbers()

    def numbers(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: {key: line.get(key) for key in EXACT} for line in read_metrics(self.run)}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] == name]

    def moment(self, known: int) -> str:
        """What a life was doing at its end, by the events after the first `known`."""
        said = [event["event"] for event in read_events(self.run)[known:]]
        if not said:
            return "starting"
        saves = [event for event in said if event.startswith("save_")]
        return "saving" if saves and saves[-1] == "save_begin" else "training"


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The numbers of a run that nobody disturbs."""
    numbers = Lives(config, tmp_path_factory.mktemp("undisturbed")).finish()
    assert sorted(numbers) == list(range(1, STEPS + 1))
    return numbers


@pytest.mark.long
def test_killed_at_random_moments(config: Path, reference: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """Row 1: all ranks with -9, in start, steps and saves; the newest checkpoint is whole, and the end the same."""
    rng, shared = random.Random(1), shared_memory.entries()
    number, kills, moments = 0, 0, Counter[str]()
    lives, longest = Lives(config, tmp_path / "0"), 1.0
    while kills < KILLS:
        known = len(read_events(lives.run))
        begin, life = time.monotonic(), lives.begin()
        moment = rng.uniform(0, longest)
        life.until(lambda begin=begin, moment=moment: time.monotonic() - begin > moment)
        life.send(signal.SIGKILL)
        killed = signal.SIGKILL in {-status for status in life.end().values()}
        # As long as a life takes on this machine now: later moments would only find runs that have ended.
        longest = 1.1 * longest if killed else time.monotonic() - begin
        assert life.left_behind() == [], "a process outlives its rank"
        kills += killed
        moments[lives.moment(known)] += killed
        if steps := lives.store.steps():
            assert integrity.verify(lives.store.path(steps[-1]), step=steps[-1]) == [], (
                f"kill {kills} at {moment:.3f} s"
            )
        if not killed:
            assert set(life.statuses.values()) == {0}, life.said
        if sorted(lives.numbers()) == list(range(1, STEPS + 1)):
            assert lives.finish() == reference
            number += 1
            lives = Lives(config, tmp_path / f"{number}")
    assert lives.finish() == reference
    assert shared_memory.left_behind(shared) == set()
    fell = ", ".join(f"{count} while {moment}" for moment, count in moments.most_common())
    print(f"\n{kills} kills: {fell}; {number + 1} runs of {STEPS} steps ended with the numbers of the undisturbed one")


# Where one rank is killed, attempt after attempt of the same run, and which one. A `*`: the first save of the attempt,
# whichever step that is.
DEATHS = {
    "1:3:step:kill": 1,
    "0:*:save:kill": 0,
    "1:*:finalize:kill": 1,
    "0:12:eval:kill": 0,
    "*:*:write:hang,1:17:step:kill": 1,  # with hanging writers on both
}


@pytest.mark.parametrize(
    "places",
    [tuple(DEATHS)[:3], pytest.param(tuple(DEATHS)[3:], marks=pytest.mark.long)],
    ids=["step, save, finalize", "evaluation, hanging writes"],
)
def test_one_rank_is_killed_at_every_place(
    config: Path, reference: dict[int, dict[str, Any]], tmp_path: Path, places: tuple[str, ...]
) -> None:
    """Rows 2 and 32: the others end by themselves and not well, nobody is left, the next start goes on."""
    lives, shared = Lives(config, tmp_path), shared_memory.entries()
    for faults in places:
        rank = DEATHS[faults]
        life = lives.begin(faults)
        statuses = life.end()
        assert statuses.pop(rank) == -signal.SIGKILL, (faults, statuses, life.said)
        assert statuses.popitem()[1] not in (0, 75), (faults, life.said)
        assert life.left_behind() == [], faults
        steps = lives.store.steps()
        assert all(integrity.verify(lives.store.path(step), step=step) == [] for step in steps), faults
    assert lives.finish() == reference
    assert not [entry for entry in lives.store.root.iterdir() if entry.name != LATEST and "." in entry.name]
    assert shared_memory.left_behind(shared) == set()


STOPS = {
    "in a step": "1:3:step:term",
    "when a save begins": "0:*:save:term",
    "in an evaluation": "1:12:eval:usr2",
    "twice": "1:15:step:term,1:15:save:term",
    "in the first step": "0:16:step:usr2",  # of its attempt
    "while an earlier save hangs": "1:18:write:hang,0:19:step:term",
}
GRACE_S = 4  # that save is given up after half of it


@pytest.mark.long
def test_one_rank_is_asked_to_stop(config: Path, reference: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """Rows 23 and 24: all ranks end with 75 behind a committed save of their last step, whichever rank was asked."""
    lives = Lives(config, tmp_path)
    for attempt, (when, faults) in enumerate(STOPS.items(), start=1):
        life = lives.begin(faults, "--grace", str(GRACE_S))
        assert life.end() == {0: 75, 1: 75}, (when, life.said)
        last = [event for event in read_events(lives.run) if event["attempt"] == attempt][-2:]
        assert [event["event"] for event in last] == ["save_committed", "stop"], when
        assert last[0]["step"] == last[1]["step"] == lives.store.steps()[-1], when
        assert integrity.verify(lives.store.path(last[0]["step"])) == [], when
    (given_up,) = lives.events("save_failed")
    assert given_up["step"] == 18 and given_up["seconds"] < 60
    assert re.fullmatch(r"still writing after [\d.]+ s \(--grace of a stop\)", given_up["reason"])
    # SIGKILL before the save of a stop is done: the last commit stands.
    stood = lives.store.steps()[-1]
    life = lives.begin(f"0:{stood + 1}:step:term,*:{stood + 1}:write:hang")
    life.until(lambda: any(e["step"] == stood + 1 for e in lives.events("save_begin")))
    life.send(signal.SIGKILL)
    assert set(life.end().values()) == {-signal.SIGKILL}
    assert life.left_behind() == [] and lives.store.steps()[-1] == stood
    assert lives.finish() == reference


@pytest.mark.long
def test_storage_that_refuses_does_not_stop_the_training(
    config: Path, reference: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """Row 10, from end to end: a warning, an event, a figure, the same numbers; and 74 where nothing can be saved."""
    lives = Lives(config, tmp_path / "once")
    life = lives.begin("1:2:write:ENOSPC")
    assert life.end() == {0: 0, 1: 0}, life.said
    assert lives.numbers() == reference
    (failed,) = lives.events("save_failed")
    assert (failed["step"], failed["rank"], failed["in_a_row"]) == (2, 1, 1)
    warning = "warning: the save of step 2 failed on rank 1 and is given up: No space left on device"
    warnings = [line for line in life.said.splitlines() if "warning" in line]
    assert len(warnings) == 2 and warnings[0].startswith("warning: MMSCALE_FAULTS") and warnings[1] == warning
    assert read_metrics(lives.run)[-1]["save_failures"] == 1
    assert any("step_time_saving_s" in line for line in read_metrics(lives.run))
    for committed in lives.events("save_committed"):
        assert 0 < committed["blocked_s"] <= committed["seconds"] and committed["bytes"] > 0
    assert lives.store.steps()[-1] == STEPS
    lives = Lives(config, tmp_path / "never")
    life = lives.begin("0:*:write:EIO", "checkpoint.max_failures=2")
    assert life.end() == {0: 74, 1: 74}, life.said
    assert "error: 2 saves in a row failed, the last one on rank 0: Input/output error" in life.said
    assert "  fix: make sure that " in life.said and "Traceback" not in life.said
    life = lives.begin("0:*:write:EIO", "checkpoint.every=0", "train.steps=6")
    assert life.end() == {0: 74, 1: 74}, life.said
    assert "error: the last save, of step 6, failed: rank 0: Input/output error" in life.said
    assert lives.store.steps() == []
