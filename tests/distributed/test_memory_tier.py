"""Snapshots in shared memory over real ranks and real guards: one lost member is rebuilt, anything worse goes to disk.

Lives are separate sets of processes; what survives between them is what guards keep in /dev/shm.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.resilience import generations, guard, snapshot_files, state_image
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.memory_tiers import (
    WORLD,
    content,
    events,
    folders,
    go_on,
    guard_of,
    live,
    lose,
    started,
    tier,
    until,
)
from tests.support import run_ranks


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A run's folder; afterwards no guard and no memory of any of its generations is left."""
    seen: set[Path] = set()
    (tmp_path / "seen").mkdir()
    yield tmp_path
    for file in (tmp_path / "seen").iterdir():
        seen |= {snapshot_files.ROOT / file.name}
    for folder in seen:
        if folder.exists():
            folder.chmod(0o700)
        guard.end(folder)
    left = [folder for folder in seen if folder.exists()]
    assert not left
    until(lambda: all(guard_of(folder) is None for folder in seen), "a guard lives")


def test_one_of_four_is_rebuilt(place: Path) -> None:
    live(place, steps=3)
    found = folders(place)
    for folder in found:
        assert folder.stat().st_mode & 0o777 == 0o700
        files = [file for file in folder.iterdir() if not file.is_socket()]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert {file.name for file in files} == {
            *(f"{kind}.{slot}" for kind in ("image", "parity", "commit") for slot in (0, 1)),
            snapshot_files.LOG,
        }
    assert (place / generations.INDEX).stat().st_mode & 0o777 == 0o600
    images = [snapshot_files.image_file(folder, 1).stat().st_size for folder in found]
    kept = [snapshot_files.parity_file(folder, 1).stat().st_size for folder in found]
    assert max(kept) <= 0.34 * max(images)
    lose(found[2])
    assert go_on(place) == [3] * WORLD
    (told,) = events(place)
    assert told["event"] == "memory_restored" and told["rebuilt"] == [2] and told["step"] == 3
    assert not (place / generations.INDEX).exists()
    assert not any(folder.exists() for folder in found)


def flip(file: Path) -> None:
    """One bit in the middle."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def edit(folder: Path, **values: Any) -> None:
    """Another commit marker for the newest snapshot."""
    file = folder / "commit.1"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def parities(folder: Path) -> list[Path]:
    return [snapshot_files.parity_file(folder, slot) for slot in snapshot_files.SLOTS]


@dataclass(frozen=True)
class Damage:
    """What is done to the folders of some ranks, the step that is left, and what is said.

    After snapshots 1 to 3 slot 1 holds step 3 and slot 0 step 2.
    """

    do: Callable[[Path], object]
    ranks: tuple[int, ...]
    step: int | None
    said: str
    more: Callable[[list[Path]], object] = list


DAMAGES = {
    "two lost": Damage(lose, (0, 3), None, r"ranks \[0, 3\] have lost their memory"),
    "flipped": Damage(lambda at: flip(at / "image.1"), (1,), 3, "rank 1: the digest of image.1 is wrong"),
    "two flipped": Damage(lambda at: flip(at / "image.1"), (1, 2), 2, "rank 2: the digest of image.1 is wrong"),
    "lost and parity flipped": Damage(
        lose, (0,), None, "rank 1: the digest of parity.0 is wrong", more=lambda at: [flip(f) for f in parities(at[1])]
    ),
    "torn": Damage(lambda at: snapshot_files.uncommit(at, 1), (2,), 3, "rank 2: slot 1 holds a torn snapshot"),
    "two torn": Damage(lambda at: snapshot_files.uncommit(at, 1), (0, 1), 2, "rank 1: slot 1 holds a torn snapshot"),
    "of another attempt": Damage(lambda at: edit(at, attempt=7), (0, 1), 2, "rank 1: a stale commit marker"),
    "of another generation": Damage(lambda at: edit(at, generation="x"), (3,), 3, "rank 3: a stale commit marker"),
    "of another step": Damage(lambda at: edit(at, step=2, serial=2), (0, 1), 2, "have lost their memory"),
    "of another rank": Damage(lambda at: edit(at, rank=2), (0,), 3, "rank 0: a commit marker of rank 2"),
    "contradicting": Damage(lambda at: edit(at, digests=["0" * 32] * 4), (3,), 2, "contradict each other"),
    "truncated": Damage(lambda at: os.truncate(at / "image.1", 4096), (0,), 3, "has 4096 bytes instead of"),
    "unreadable": Damage(lambda at: (at / "commit.1").write_text("{"), (0,), 3, "a commit marker that is not readable"),
    "open to others": Damage(lambda at: at.chmod(0o755), (0,), 3, ""),
}


# In `make test`: one damage of each kind that is rebuilt, refused or answered by the slot before.
SHORT = ("two lost", "flipped", "two torn", "of another attempt", "of another rank", "contradicting", "open to others")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in DAMAGES]
)
def test_damage_is_rebuilt_or_refused(name: str, place: Path) -> None:
    damage = DAMAGES[name]
    live(place, steps=3)
    at = folders(place)
    for rank in damage.ranks:
        damage.do(at[rank])
    damage.more(at)
    assert go_on(place) == [damage.step] * WORLD, events(place)
    (told,) = events(place)
    assert told["event"] == ("memory_restored" if damage.step else "memory_refused")
    reasons = told["refused"] if damage.step else told["reasons"]
    assert not damage.said or any(re.search(damage.said, reason) for reason in reasons), reasons
    assert told.get("rebuilt", []) == (list(damage.ranks) if damage.step == 3 else [])


def test_a_rank_that_dies_in_the_middle_of_a_copy(place: Path) -> None:
    """Its slot is torn and nobody commits that step: the one before is whole on all ranks."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = started(tier(ranks, place), place)
        for step in (1, 2, 3):
            state: dict[str, Any] = {"step": step, "rank": ranks.rank}
            if ranks.rank == 1 and step == 3:
                made._plan = _DiesHalfway(**vars(made._plan))
            assert made.snapshot(step, content(ranks.rank, step), state)
            assert step == 3 or made.wait()
        os._exit(0)

    run_ranks(ranks_do, world_size=WORLD)
    assert go_on(place) == [2] * WORLD
    assert "rank 1: slot 1 holds a torn snapshot" in events(place)[-1]["refused"]


class _DiesHalfway(state_image.ImagePlan):
    """Writes one tensor of several, and the process is gone."""

    def write(self, buffer: Tensor, views: list[Tensor], tensors: Mapping[str, Tensor], plain: Any) -> None:
        views[0].copy_(next(iter(tensors.values())))
        os._exit(0)


def test_only_what_is_newer_than_the_disk_and_of_the_same_run(place: Path) -> None:
    live(place, steps=2, world=2, group_size=2)
    index = (place / generations.INDEX).read_text()
    for options, said in (
        ({"above": 2}, "step 2 is not newer than the checkpoint of step 2"),
        ({"identity": {"config_digest": "b"}}, "config_digest changed"),
    ):
        at = folders(place)
        kept = [{file.name: file.read_bytes() for file in one.iterdir() if not file.is_socket()} for one in at]
        assert go_on(place, world=2, **options) == [None, None]
        assert events(place)[-1]["event"] == "memory_refused"
        assert said in events(place)[-1]["reasons"]
        for one, files in zip(at, kept, strict=True):  # the life after a refusal gives memory back: put it there again
            assert not one.exists()
            one.mkdir(mode=0o700)
            for name, content_of_file in files.items():
                (one / name).write_bytes(content_of_file)
        (place / generations.INDEX).write_text(index)
    assert go_on(place, world=2, above=1) == [2, 2]  # nobody guards it any more: memory alone is enough


def test_a_mirror_of_two_and_ranks_that_moved(place: Path) -> None:
    """The state of rank 0 lies with rank 1 and the other way round: it is sent to where it belongs."""
    live(place, steps=2, world=2, group_size=2)
    seen_by = {0: 1, 1: 0}
    held = snapshot_files.existing_folder

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = tier(ranks, place, attempt=2)
        names = made._left[-1].folders
        snapshot_files.existing_folder = (  # each rank sees the other one's node
            lambda name, root: held(name, root) if name == names[seen_by[ranks.rank]] else None
        )
        found = made.restore(above=0, accept=lambda tensors, plain: [])
        assert found is not None and found[2]["rank"] == ranks.rank
        assert torch.equal(found[1]["large"], content(ranks.rank, 2)["large"])
        snapshot_files.existing_folder = held
        made.close()

    run_ranks(ranks_do, world_size=2)
    live(place, steps=1, world=2, group_size=2, attempt=3)
    lose(folders(place)[1])
    assert go_on(place, world=2, attempt=4) == [1, 1]
    assert events(place)[-1]["rebuilt"] == [1]


def test_a_new_generation_takes_over_when_its_first_snapshot_is_committed(place: Path) -> None:
    live(place, steps=1, world=2)
    old = folders(place)

    def dies_before_its_first_snapshot(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = tier(ranks, place, attempt=2)
        assert made.restore(above=0, accept=lambda tensors, plain: []) is not None
        started(made, place)
        torch.distributed.barrier()
        os._exit(0)

    run_ranks(dies_before_its_first_snapshot, world_size=2)
    between = folders(place)

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = tier(ranks, place, attempt=3)
        found = made.restore(above=0, accept=lambda tensors, plain: [])
        assert found is not None and found[0] == 1
        started(made, place)
        assert made.snapshot(2, content(ranks.rank, 2), {"step": 2, "rank": ranks.rank}) and made.wait()
        torch.distributed.barrier()
        assert all(folder.exists() for folder in old) and len(generations.read_index(place)) == 3
        torch.distributed.barrier()
        assert made.snapshot(3, content(ranks.rank, 3), {"step": 3, "rank": ranks.rank}) and made.wait()
        torch.distributed.barrier()
        assert not any(folder.exists() for folder in old) and len(generations.read_index(place)) == 1
        torch.distributed.barrier()
        made.forget()  # as after a roll-back
        torch.distributed.barrier()
        if ranks.rank == 0:
            assert not guard.end(folders(place)[1])  # its trainer lives
        torch.distributed.barrier()
        os._exit(0)

    run_ranks(ranks_do, world_size=2)
    until(lambda: all(guard_of(folder) is None for folder in [*old, *between]), "guards of former attempts live")
    assert go_on(place, world=2, attempt=4) == [None, None]
    assert "rank 0: slot 1 holds a torn snapshot" in events(place)[-1]["reasons"]


def test_a_tier_that_cannot_work_says_so_and_is_off(place: Path) -> None:
    """A dead guard, no space, no folder: training goes on, and nothing is left."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = started(tier(ranks, place), place)
        torch.distributed.barrier()  # rank 0 has written the index
        at = folders(place)
        assert made.snapshot(1, content(ranks.rank, 1), {}) and made.wait()
        torch.distributed.barrier()
        if ranks.rank == 1:
            pid = guard_of(at[1])
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its end of the socket pair is closed by then
        torch.distributed.barrier()
        assert not made.snapshot(2, content(ranks.rank, 2), {})
        assert not made.snapshot(3, content(ranks.rank, 3), {}) and not made.due(4)
        torch.distributed.barrier()
        assert not any(folder.exists() for folder in at)

        free = snapshot_files.free_bytes
        snapshot_files.free_bytes = lambda root: (1 << 20, 1 << 20)
        full = started(tier(ranks, place, attempt=2), place)
        assert not full.snapshot(1, {"large": torch.zeros(300_000)}, {})
        snapshot_files.free_bytes = free

        nowhere = tier(ranks, place, attempt=3, root=place / "nowhere")
        nowhere.start()
        assert not nowhere.snapshot(1, content(ranks.rank, 1), {})
        torch.distributed.barrier()

    run_ranks(ranks_do, world_size=2)
    dead, full, nowhere = events(place)
    assert {event["event"] for event in (dead, full, nowhere)} == {"memory_off"}
    assert "rank 1: the guard died" in dead["reasons"][0]
    assert "ranks need 9 MiB of /dev/shm, 0 MiB can be taken" in full["reasons"][0]
    assert "no guard could be started" in nowhere["reasons"][0]
    assert not (place / generations.INDEX).exists()


def test_sizes_that_change_and_snapshots_that_come_too_fast(place: Path) -> None:
    """Memory is laid out anew; what is not yet committed everywhere is never overwritten."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = started(tier(ranks, place, group_size=3), place)
        assert made.snapshot(1, {"a": torch.ones(5)}, {"step": 1, "rank": ranks.rank}) and made.wait()
        torch.distributed.barrier()
        grown = {"step": 2, "rank": ranks.rank, "long": "x" * 100_000 * ranks.rank}
        assert made.snapshot(2, {"a": torch.ones(5), "b": torch.ones(1 << 20)}, grown)
        taken = sum(made.snapshot(3, content(ranks.rank, 3), {"step": 3, "rank": ranks.rank}) for _ in range(3))
        assert made.statistics.taken + made.statistics.skipped == 5 and made.statistics.taken == 2 + taken
        assert made.wait()
        torch.distributed.barrier()
        while not made.snapshot(4, content(ranks.rank, 4), {"step": 4, "rank": ranks.rank}):
            assert made.wait()
        assert made.wait() and made.statistics.digest_s > 0.0
        torch.distributed.barrier()
        os._exit(0)

    run_ranks(ranks_do, world_size=3)
    lose(folders(place)[0])
    assert go_on(place, world=3) == [4, 4, 4]


def test_a_guard_does_not_wait_for_ever(place: Path) -> None:
    live(place, steps=1, world=2, hold_s=0.3)
    until(lambda: not any(folder.exists() for folder in folders(place)), "guards hold out longer than they should")
    assert go_on(place, world=2) == [None, None]
    assert events(place)[-1]["reasons"] == ["no rank's memory holds a committed snapshot"]
