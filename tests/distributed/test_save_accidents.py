"""A rank that is killed in a save, and a file system that is full."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mmscale.resilience.inject import VARIABLE, Faults
from mmscale.runtime.rank_env import RankEnv
from tests import shared_memory
from tests.distributed.test_damage import begin
from tests.distributed.test_save_faults import PATIENCE_S, Loop, assert_clean, assert_holds
from tests.support import distributed, run_ranks


@distributed(world_size=2)
def test_killed_in_a_save_leaves_no_process(ranks: RankEnv, tmp_path: Path) -> None:
    """Row 32: a trainer that is killed with -9 takes its hanging writer with it; no shared memory is left."""
    begin(ranks)
    before = shared_memory.entries()
    parent = os.getpid()
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        # A trainer of its own that is not in the process group: rank by rank, without any collective.
        from mmscale.checkpoint.forked import Forked, die_with

        die_with(parent)
        injected = Faults.of_rank(0, {VARIABLE: "*:*:write:hang"})
        task = Forked(lambda tell: injected.at("write", 1), name="the writer")
        os.write(writing, task.pid.to_bytes(4, "little"))
        while task.poll():
            time.sleep(0.01)
        os._exit(0)
    writer = int.from_bytes(os.read(reading, 4), "little")
    assert psutil.Process(writer).ppid() == trainer
    os.kill(trainer, 9)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the writer outlives its trainer"
        time.sleep(0.002)
    torch.distributed.barrier()
    assert shared_memory.left_behind(before) == set()


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    """Row 10 for real: a tmpfs that has no room for the second checkpoint, and more room for the third."""

    def ranks_do(ranks: RankEnv) -> None:
        mounted = tmp_path / "small"
        mounted.mkdir()
        mount_for_itself(mounted, "size=1m")
        begin(ranks)
        loop = Loop(mounted, ranks, elements=150_000)  # 600 kB
        loop.step()
        loop.save(last=True)
        loop.step()
        loop.save()
        loop.landed()
        (failed,) = loop.events("save_failed")
        assert "No space left on device" in failed["reason"]
        libc().mount(b"none", str(mounted).encode(), None, MS_REMOUNT, b"size=8m")
        loop.step()
        loop.save(last=True)
        assert loop.committed() == [1, loop.state.step]
        assert_clean(loop)
        assert_holds(loop, loop.state.step)

    run_ranks(ranks_do, world_size=1)


CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT, MS_REC_PRIVATE = 0x20000, 0x10000000, 32, 0x4000 | 1 << 18


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def mount_for_itself(folder: Path, options: str) -> None:
    """A tmpfs that only this process sees; skips the test where the kernel does not let it."""
    user, group = os.getuid(), os.getgid()
    if libc().unshare(CLONE_NEWNS | (0 if user == 0 else CLONE_NEWUSER)):
        pytest.skip(f"no mount of its own: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc().mount(b"none", b"/", None, MS_REC_PRIVATE, None)
    if libc().mount(b"none", str(folder).encode(), b"tmpfs", 0, options.encode()):
        pytest.skip(f"no tmpfs: {os.strerror(ctypes.get_errno())}")
