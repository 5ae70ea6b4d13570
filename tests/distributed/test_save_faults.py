"""No save stops the training: every fault of storage and of writers, on forked ranks, and the state after recovery.

A small loop stands for the trainer: a step changes the weights in place, and its border agrees on the save under way as
train/attempt.py does. Faults come from resilience/inject.py, by rank, step and place.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import LATEST
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import BestCheckpoint, SaveSettings
from mmscale.errors import SaveError
from mmscale.resilience.inject import VARIABLE, Faults
from mmscale.resilience.signals import StopRequest
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_damage import Weights, begin
from tests.support import distributed, run_ranks

PATIENCE_S = 60.0
CPU = torch.device("cpu")


@dataclass
class Loop:
    """Trains weights, and saves them."""

    run: Path
    ranks: RankEnv
    faults: str = ""
    attempt: int = 1
    elements: int = 1000
    options: dict[str, Any] = field(default_factory=dict)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = {"asynchronous": True, "deadline_s": PATIENCE_S, **self.options}
        self.injected = Faults.of_rank(self.ranks.rank, {VARIABLE: self.faults})
        self.checkpoints = CheckpointManager(
            self.run,
            every=1,
            keep=99,
            attempt=self.attempt,
            info={},
            on_event=lambda event, **fields: self.told.append((event, fields)),
            saves=SaveSettings(**settings),
            on_point=self.injected.at,
        )
        self.saver = self.checkpoints.saver
        self.state = Weights(0, elements=self.elements)
        self.stop = StopRequest()

    def resume(self) -> int | None:
        newest = self.checkpoints.choose()
        if newest is not None:
            self.checkpoints.load(self.state, newest)
        return newest

    def step(self) -> None:
        """A step and its border."""
        self.state.step += 1
        self.state.tensor.add_(1.0)
        self.step_boundary()

    def step_boundary(self) -> None:
        _, (working, failed) = self.stop.agreed_with(CPU, *self.saver.status())
        self.saver.advance(working, failed)

    def save(self, *, last: bool = False) -> None:
        self.checkpoints.save(self.state, last=last)

    def until(self, condition: Callable[[], bool]) -> None:
        """Train on until something has happened that is the same on every rank."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen: {self.told}"
            self.step()
            time.sleep(0.002)

    def shorten_deadline(self, deadline_s: float) -> None:
        """The save that hangs now may take this long only; all others as long as a busy machine needs."""
        self.saver.settings = replace(self.saver.settings, deadline_s=deadline_s)

    def landed(self) -> None:
        """Train on until no save is under way."""
        self.until(lambda: not self.saver.under_way)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.told if event == name]

    def committed(self) -> list[int]:
        torch.distributed.barrier()
        return self.checkpoints.store.steps()


def assert_clean(loop: Loop) -> None:
    """No process is left, and nothing but whole checkpoints."""
    loop.saver.close()
    deadline = time.monotonic() + PATIENCE_S
    while psutil.Process().children(recursive=True):
        assert time.monotonic() < deadline, psutil.Process().children(recursive=True)
        loop.saver.status()
        time.sleep(0.002)
    torch.distributed.barrier()
    store = loop.checkpoints.store
    names = sorted(entry.name for entry in store.root.iterdir())
    assert names == [LATEST, *(store.path(step).name for step in store.steps())]
    for step in store.steps():
        assert integrity.verify(store.path(step), step=step) == []
    torch.distributed.barrier()


def assert_holds(loop: Loop, step: int) -> None:
    """A new process would go on from this step, with its values."""
    again = Loop(loop.run, loop.ranks, attempt=9, elements=loop.elements)
    assert again.resume() == step
    assert again.state.step == step and again.state.is_whole()


HURRY_S = 0.05


def only_the_faulty_one_works(loop: Loop, *, committing: bool) -> bool:
    """Whether all other processes of the save have done their part, as seen by all ranks; grouped, none can."""
    pending = loop.saver._pending
    assert pending is not None
    at_work = torch.tensor([int(pending.task is not None and pending.task.poll())])
    torch.distributed.all_reduce(at_work)
    waiting = 1 if committing or not loop.saver.settings.writers else at_work.numel() + 1
    return at_work.item() == waiting and (pending.phase == "commit") == committing


# Row of the fault matrix: fault while step 2 is saved, the rank it is told of (None: whoever is first), and why.
SAVE_FAULTS: dict[str, tuple[str, int | None, str]] = {
    "10 no space on one rank": ("1:2:write:ENOSPC", 1, "No space left on device"),
    "10 no space on all ranks": ("*:2:write:ENOSPC", None, "No space left on device"),
    "10 input/output error": ("0:2:write:EIO", 0, "Input/output error"),
    "10 quota": ("1:2:write:EDQUOT", 1, "Disk quota exceeded"),
    "10 read-only": ("1:2:write:EROFS", 1, "Read-only file system"),
    "10 no space for the commit": ("0:2:commit:ENOSPC", 0, "No space left on device"),
    "12 a write hangs": ("1:2:write:hang", 1, r"still writing after 0.05 s"),
    "12 the commit hangs": ("0:2:commit:hang", 0, r"still committing after 0.05 s"),
    "12 a writer is stopped": ("0:2:write:stop", 0, r"still writing after 0.05 s"),
    "13 a writer is killed": ("1:2:write:kill", 1, "the writer was ended by SIGKILL"),
    "13 the commit is killed": ("0:2:commit:kill", 0, "the commit was ended by SIGKILL"),
}


# Of saves in which one rank writes for both, in `make test`.
GROUPED = ("12 a write hangs",)


@pytest.mark.parametrize(
    ("writers", "names"),
    [
        pytest.param(0, tuple(SAVE_FAULTS), id="0"),
        pytest.param(1, GROUPED, id="1"),
        pytest.param(1, tuple(sorted(SAVE_FAULTS.keys() - set(GROUPED))), id="1-more", marks=pytest.mark.long),
    ],
)
def test_a_save_that_fails_is_given_up_and_the_next_one_works(
    tmp_path: Path, writers: int, names: tuple[str, ...]
) -> None:
    """Rows 10, 12 and 13: reason and rank are told, the trainer goes on, nothing is left of the save.

    Also where one rank writes for both: what it does not know by itself, it is told.
    """

    def ranks_do(ranks: RankEnv) -> None:
        begin(ranks)
        for number, name in enumerate(names):
            faults, rank, reason = SAVE_FAULTS[name]
            loop = Loop(tmp_path / f"{number}", ranks, faults, options={"writers": writers})
            loop.step()
            loop.save(last=True)
            loop.step()
            loop.save()
            if "still" in reason:
                loop.until(functools.partial(only_the_faulty_one_works, loop, committing="committing" in reason))
                loop.shorten_deadline(HURRY_S)
            loop.landed()
            loop.shorten_deadline(PATIENCE_S)
            assert loop.saver.failures == 1, name
            if ranks.rank == 0:
                (failed,) = loop.events("save_failed")
                waits = writers and "still writing" in reason  # the rank that writes, for the one that hangs
                assert failed["step"] == 2 and (waits or rank in (failed["rank"], None)), (name, failed)
                assert re.search(reason, failed["reason"]), name
                assert failed["in_a_row"] == 1
            assert loop.committed() == [1], name
            loop.until(lambda loop=loop: loop.state.step >= 4)
            loop.save()
            newest = loop.state.step
            loop.landed()
            assert loop.committed() == [1, newest], name
            assert loop.saver.figures()["save_failures"] == 1
            loop.save(last=True)
            assert_clean(loop)
            assert_holds(loop, loop.state.step)

    run_ranks(ranks_do, world_size=2, timeout_s=400)


@distributed(world_size=2)
def test_a_failed_save_of_a_better_one_keeps_the_best_one(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    loop = Loop(tmp_path, ranks, "*:2:write:ENOSPC")
    loop.saver.retention = replace(loop.saver.retention, keep=1)
    for step, value in ((1, 1.0), (2, 0.5)):
        while loop.state.step < step:
            loop.step()
        loop.saver.best = BestCheckpoint("eval/loss", step, value)
        loop.save()
        if step == 1:
            while loop.saver.under_way:  # the next step is 2 for certain
                loop.step_boundary()
        else:
            loop.landed()
    while loop.state.step < 5:
        loop.step()
    loop.save(last=True)
    assert loop.committed() == [1, loop.state.step] and loop.checkpoints.store.best() == 1
    assert_clean(loop)


@distributed(world_size=2)
def test_the_file_holds_the_step_of_the_save(ranks: RankEnv, tmp_path: Path) -> None:
    """Row 15: steps change the weights in place while a slow writer has not come to them yet."""
    begin(ranks)
    loop = Loop(tmp_path, ranks, "*:3:write:slow=0.2", elements=1_000_000)
    loop.until(lambda: loop.state.step == 3)
    loop.save()
    loop.until(lambda: loop.state.step >= 8)
    assert loop.saver.under_way
    loop.landed()
    again = Loop(tmp_path, ranks, attempt=2, elements=1_000_000)
    assert again.resume() == 3
    assert again.state.is_whole() and not torch.equal(again.state.tensor, loop.state.tensor)
    assert_clean(loop)


@distributed(world_size=2)
def test_slow_storage_has_one_save_at_a_time(ranks: RankEnv, tmp_path: Path) -> None:
    """Row 11: saves that are due meanwhile are left out and counted, never queued; steps go on."""
    begin(ranks)
    loop = Loop(tmp_path, ranks, "0:*:write:slow=0.1")
    writers = 0
    while loop.saver.skipped < 5:
        loop.step()
        loop.save()
        writers = max(writers, len(psutil.Process().children()))
    assert writers <= 1
    loop.landed()
    first, *_ = loop.committed()
    assert first == 1 and loop.saver.failures == 0
    assert loop.saver.figures()["saves_skipped"] == loop.saver.skipped >= 5
    assert "step_time_saving_s" not in loop.saver.figures()  # once for every save
    if ranks.rank == 0:
        assert [fields["under_way"] for fields in loop.events("save_skipped")][:5] == [1] * 5
        assert loop.events("save_committed")[0]["step_time_s"] > 0
    loop.save(last=True)
    assert_clean(loop)
    assert_holds(loop, loop.state.step)


@distributed(world_size=2)
def test_several_failures_in_a_row_end_the_attempt(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    loop = Loop(tmp_path, ranks, "1:1:write:EIO,1:3:write:EIO,1:4:write:EIO", options={"max_failures": 2})
    for step in (1, 2, 3):  # the second one does not fail, and the count begins anew
        loop.state = Weights(step)
        loop.save()
        while loop.saver.under_way:
            loop.step_boundary()
    loop.state = Weights(4)
    loop.save()
    with pytest.raises(
        SaveError, match="2 saves in a row failed, the last one on rank 1: Input/output error"
    ) as raised:
        loop.landed()
    assert raised.value.exit_status == 74 and str(loop.checkpoints.store.root) in raised.value.remedy
    assert loop.committed() == [2] and loop.saver.failures == 3
    assert_clean(loop)


@distributed(world_size=2)
def test_the_last_save_is_waited_for_and_tried_again(ranks: RankEnv, tmp_path: Path) -> None:
    """Behind one that is under way; and an error where it cannot be made: never a run that looks finished."""
    begin(ranks)
    loop = Loop(tmp_path / "slow", ranks, "*:1:write:slow=0.1", options={"max_failures": 1})
    loop.step()
    loop.save()
    loop.step()
    loop.save(last=True)
    assert loop.committed() == [1, 2] and not loop.saver.under_way
    assert_clean(loop)
    loop = Loop(tmp_path / "hangs", ranks, "1:2:write:hang")
    loop.step()
    loop.save(last=True)
    loop.step()
    loop.shorten_deadline(HURRY_S)
    with pytest.raises(SaveError, match=r"the last save, of step 2, failed: rank \d: still writing after 0.05 s"):
        loop.save(last=True)
    assert loop.saver.failures == 2 and loop.committed() == [1]
    assert_clean(loop)
    assert_holds(loop, 1)


@distributed(world_size=2)
def test_a_save_that_hangs_is_given_up_for_the_last_one(ranks: RankEnv, tmp_path: Path) -> None:
    """A stop leaves little time: a save that hangs gets a part of it, one that is slow is waited for within that."""
    begin(ranks)
    for number, (fault, failures) in enumerate((("1:1:write:hang", 1), ("*:1:write:slow=0.1", 0))):
        loop = Loop(tmp_path / str(number), ranks, fault)
        loop.step()
        loop.save()
        loop.step()
        loop.saver.shorten_deadline(0.2 if failures else PATIENCE_S)
        loop.save(last=True)
        assert loop.committed() == [1, 2][failures:] and loop.saver.failures == failures
        if failures and ranks.rank == 0:
            (failed,) = loop.events("save_failed")
            assert re.fullmatch(r"still writing after [\d.]+ s \(--grace of a stop\)", failed["reason"])
        assert_clean(loop)
        assert_holds(loop, 2)
