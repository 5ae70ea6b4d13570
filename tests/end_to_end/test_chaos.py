"""Random events, one after the other, on runs of 1, 2 and 4 ranks; each ends with the numbers of an undisturbed one.

    make chaos                        50 events with a seed of its own, which is printed
    make chaos EVENTS=200 SEED=7      as many as that, of that sequence

The suite does MMSCALE_CHAOS=5. Ranks are real processes; disks are real file systems in loop files and memory. The
clock jumps for Python's time.time alone: Linux has no namespace for it, and setting the machine's would disturb others.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import read_metrics
from mmscale.runtime import disk_writer
from tests.end_to_end.disks import KINDS, Disk, disk_of
from tests.end_to_end.lives import Life
from tests.end_to_end.running import mmscale
from tests.end_to_end.test_train import EXACT

EVENTS = int(os.environ.get("MMSCALE_CHAOS", "5"))
SEED = int(os.environ.get("MMSCALE_CHAOS_SEED", "1"))
STEPS = 24
LAYOUTS = {1: ("parallel.ep=1",), 2: ("parallel.ep=2",), 4: ("parallel.ep=2", "parallel.tp=2")}  # by ranks
SETTINGS = (f"train.steps={STEPS}", "train.eval_every=12", "train.dry_run=false", "checkpoint.every=2")
SETTINGS += ("checkpoint.keep=3", "checkpoint.max_failures=99", "resilience.hang_timeout=60")
SLOW = "*:*:step:slow=0.05"  # so that events fall into steps
REAL_TIME = time.time

Numbers = dict[int, dict[str, Any]]


@dataclass
class Chaos:
    """A run, and what happens to it.

    Attributes:
        config: of the run.
        ranks: of it.
        disk: that its folder is on; None: mounts are not permitted here.
        place: the folder of runs, a second mount of the disk.
        rng: says what happens when.
        life: the attempt that is alive.
    """

    config: Path
    ranks: int
    disk: Disk | None
    place: Path
    rng: random.Random
    life: Life | None = None
    said: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place / "tiny"

    @property
    def store(self) -> Store:
        return Store.of_run(self.run)

    def arguments(self) -> list[str]:
        return ["train", str(self.config), f"run.dir={self.place}", *SETTINGS, *LAYOUTS[self.ranks]]

    def begin(self, faults: str = "") -> Life:
        """A new attempt, unless one is alive."""
        if self.life is None or not self.life.poll():
            self.end()
            self.life = Life(self.arguments(), nproc=self.ranks, faults=",".join(filter(None, (SLOW, faults))))
        return self.life

    def at_random(self, life: Life, longest_s: float = 3.0) -> None:
        """Some time later, or at its end."""
        until = time.monotonic() + self.rng.uniform(0, longest_s)
        life.until(lambda: time.monotonic() > until)

    def end(self, *, lost: bool = False) -> dict[int, int]:
        """Wait for the attempt's end; nobody is left, and what it has committed is whole.

        Args:
            lost: one rank was killed, so the others end with the error of a lost connection.
        """
        life, self.life = self.life, None
        if life is None:
            return {}
        statuses = life.end()
        assert life.left_behind() == [], "a process outlives its rank"
        errors = re.findall(r"^Traceback.*\n(?:[ \t].*\n)*(.*)", life.said, re.MULTILINE)
        assert all(lost and "gloo" in error for error in errors), life.said
        if steps := self.store.steps():
            assert integrity.verify(self.store.path(steps[-1]), step=steps[-1]) == []
        return statuses

    def numbers(self) -> Numbers:
        return {line["step"]: {key: line.get(key) for key in EXACT} for line in read_metrics(self.run)}

    def is_done(self) -> bool:
        return sorted(self.numbers()) == list(range(1, STEPS + 1))


def kill_all(chaos: Chaos) -> None:
    life = chaos.begin()
    chaos.at_random(life)
    life.send(signal.SIGKILL)
    chaos.end()


def kill_one(chaos: Chaos) -> None:
    life = chaos.begin()
    chaos.at_random(life)
    life.send(signal.SIGKILL, chaos.rng.randrange(chaos.ranks))
    # The others notice it by their connections, unless they wait for it to connect: then a launcher ends them.
    until = time.monotonic() + 10.0
    life.until(lambda: time.monotonic() > until)
    life.send(signal.SIGKILL)
    chaos.end(lost=True)


def stop(chaos: Chaos) -> None:
    life = chaos.begin()
    chaos.at_random(life)
    number = chaos.rng.choice([signal.SIGTERM, signal.SIGUSR2])
    life.until(lambda: bool(read_metrics(chaos.run)) and life.hears(number))
    life.send(number, chaos.rng.randrange(chaos.ranks))
    statuses = set(chaos.end().values())
    assert statuses <= {75} or statuses <= {0}, statuses


def disk_refuses(chaos: Chaos) -> None:
    """Full, read-only or frozen for a while; training goes on, or begins again behind it."""
    assert chaos.disk is not None
    life = chaos.begin()
    chaos.at_random(life, 1.0)
    life.until(lambda: bool(read_metrics(chaos.run)))
    if not life.poll():
        return
    chaos.disk.refuse()
    try:
        chaos.at_random(life)
    finally:
        chaos.disk.recover()


def lose_mount(chaos: Chaos) -> None:
    """The run's folder is gone for ranks that open it by name; then it is there again."""
    life = chaos.begin()
    chaos.at_random(life)
    _command("umount", "-l", chaos.place)
    try:
        chaos.at_random(life, 1.0)
    finally:
        assert chaos.disk is not None
        _command("mount", "--bind", chaos.disk.folder, chaos.place)
    life.send(signal.SIGTERM)
    chaos.end()


def slow_storage(chaos: Chaos) -> None:
    if chaos.life is not None:
        stop(chaos)
    life = chaos.begin("*:*:write:slow=0.2,*:*:commit:slow=0.2")
    chaos.at_random(life)


def clock_jumps(chaos: Chaos) -> None:
    """By hours, back or forth, within an attempt."""
    if chaos.life is not None:
        stop(chaos)
    jump = chaos.rng.choice([-1, 1]) * chaos.rng.uniform(60, 1e6)
    at = time.monotonic() + chaos.rng.uniform(0, 2)
    time.time = lambda: REAL_TIME() + (jump if time.monotonic() > at else 0)  # forked ranks have it too
    try:
        life = chaos.begin()
    finally:
        time.time = REAL_TIME
    chaos.at_random(life)


def second_start(chaos: Chaos) -> None:
    life = chaos.begin()
    life.until(lambda: bool(read_metrics(chaos.run)))
    second = mmscale(*chaos.arguments(), nproc=chaos.ranks)
    if life.poll():
        assert second.status == 1 and "is being trained by" in second.err, second


def evaluate(chaos: Chaos) -> None:
    beside(chaos, "eval", chaos.run, "--batches", "1")


def export(chaos: Chaos) -> None:
    beside(chaos, "ckpt", "reshard", chaos.run, chaos.config.parent / f"copy-{chaos.rng.random()}")


def beside(chaos: Chaos, *arguments: str | Path) -> None:
    """A command that reads the newest checkpoint while training writes and prunes others."""
    life = chaos.begin()
    life.until(lambda: bool(chaos.store.steps()))
    ended = mmscale(*arguments)
    assert ended.status == 0 or not life.poll() or "is not there" in ended.err or "no checkpoint" in ended.err, ended


HAPPENS: dict[str, Callable[[Chaos], None]] = {
    "all ranks killed": kill_all,
    "one rank killed": kill_one,
    "asked to stop": stop,
    "disk refuses": disk_refuses,
    "mount lost": lose_mount,
    "slow storage": slow_storage,
    "clock jumps": clock_jumps,
    "second start": second_start,
    "evaluation beside": evaluate,
    "copy beside": export,
}
NEEDS_DISK = ("disk refuses", "mount lost")


def _command(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextlib.contextmanager
def place_of(folder: Path, kind: str) -> Iterator[tuple[Disk | None, Path]]:
    """A folder of runs on a disk; without a disk where mounts are not permitted."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(disk_of(folder / "disk", kind))
        except pytest.skip.Exception:
            yield None, folder
            return
        place = folder / "runs"
        place.mkdir()
        _command("mount", "--bind", disk.folder, place)
        stack.callback(lambda: subprocess.run(["umount", "-l", str(place)], capture_output=True))
        yield disk, place


def finish(chaos: Chaos) -> None:
    """Go on to the end without further events."""
    for _ in range(3):
        life = chaos.begin()
        if set(chaos.end().values()) == {0}:
            return
    raise AssertionError(f"it does not end: {life.said}")


@pytest.mark.long
def test_chaos(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk_writer, "WAIT_S", 0.5)
    monkeypatch.setattr(disk_writer, "RETRY_S", 0.1)
    rng, counts, references = random.Random(SEED), Counter[str](), dict[int, Numbers]()
    say(capsys, f"\nchaos: seed {SEED}, {EVENTS} events")
    runs = 0
    while counts.total() < EVENTS:
        ranks, kind = rng.choice(list(LAYOUTS)), rng.choice(KINDS)
        if ranks not in references:
            with place_of(tmp_path / f"undisturbed{ranks}", "full") as (_, place):
                undisturbed = Chaos(config, ranks, None, place, rng)
                finish(undisturbed)
                references[ranks] = undisturbed.numbers()
        with place_of(tmp_path / f"{runs}", kind) as (disk, place):
            chaos = Chaos(config, ranks, disk, place, rng)
            say(capsys, f"run {runs}: {ranks} ranks, {f'{kind} disk' if disk else 'no disk of its own'}")
            possible = [name for name in HAPPENS if disk or name not in NEEDS_DISK]
            while counts.total() < EVENTS and not (chaos.run.exists() and chaos.is_done()):
                event = rng.choice(possible)
                began = time.monotonic()
                HAPPENS[event](chaos)
                counts[event] += 1
                say(capsys, f"  {counts.total():3d} {event}: {time.monotonic() - began:.1f} s")
            chaos.end()
            finish(chaos)
            assert chaos.numbers() == references[ranks], f"seed {SEED}, run {runs}"
        runs += 1
    apart = max((difference(one, other) for one in references.values() for other in references.values()), default=0.0)
    happened = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    say(capsys, f"{runs} runs ended with the numbers of undisturbed ones, bit by bit. {happened}.")
    say(capsys, f"Losses of {len(references)} layouts differ by {apart:.1e} at most (relative).")


def difference(one: Numbers, other: Numbers) -> float:
    return max(abs(one[step]["loss"] / other[step]["loss"] - 1) for step in one)


def say(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(line, flush=True)
