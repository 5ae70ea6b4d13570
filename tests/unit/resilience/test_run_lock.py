"""One trainer for a run: who is refused, by what can be known of the holder, from where; and what a dead one costs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.errors import LaunchError
from mmscale.resilience import lease, run_lock
from mmscale.resilience.lease import LEASE, Fence, FencedError
from mmscale.resilience.run_lock import HeldError, RunLock
from mmscale.runtime.processes import Process
from tests.module_time import replace_time

ROOT = Path(__file__).parents[3]
HOLD = """
import pathlib, sys, time
from mmscale.errors import LaunchError
from mmscale.resilience import run_lock
from mmscale.resilience.run_lock import RunLock
run_lock.BEAT_S, run_lock.SILENT_S = BEAT, SILENT
run, job, by = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with RunLock(run, job=job, by=by) as lock:
    try:
        lock.acquire(f"{by}-{job}.holder", attempt=1)
    except LaunchError as error:
        print("refused", error, flush=True)
        sys.exit(error.exit_status)
    print("held", flush=True)
    sys.stdin.read()
"""
BEAT_S, SILENT_S = 0.3, 4.0  # instead of 2 and 20
# Where a second starter may be, as the command that starts it there.
PLACES = {
    "here": (),
    "another host name": ("unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"),
    "another PID namespace": ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
}


def hold(run: Path, *, job: str = "", by: str = "train", place: str = "here") -> subprocess.Popen[str]:
    """A process that holds a run until its standard input ends; in a line it says whether it does."""
    script = HOLD.replace("BEAT,", f"{BEAT_S},").replace(", SILENT\n", f", {SILENT_S}\n")
    command = [*PLACES[place], sys.executable, "-c", script, str(run), job, by]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def held(run: Path, **how: str) -> Iterator[subprocess.Popen[str]]:
    process = hold(run, **how)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def second(run: Path, **how: str) -> str:
    """What a second starter is told."""
    return hold(run, **how).communicate("", timeout=300)[0].strip()


def beaten(run: Path, beat: int) -> lease.Lease:
    """The lease of a run, once its holder has counted further than this."""
    deadline = time.monotonic() + 60
    while (found := lease.owner(run)) is None or found.beat <= beat:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", SILENT_S)
    monkeypatch.setattr(run_lock, "BEAT_S", BEAT_S)


@pytest.mark.parametrize("by", ["train", "launch"])
@pytest.mark.parametrize("place", PLACES)
def test_a_second_one_is_refused_wherever_it_is(tmp_path: Path, place: str, by: str) -> None:
    """By the process or, where that is not to be seen, by the counter, and in words."""
    with held(tmp_path, by=by) as holder:
        said = second(tmp_path, place=place)
        assert said.startswith(f"refused {tmp_path} is being trained by process ") and "mmscale stop" in said, said
        assert str(holder.pid) in said
        found = lease.owner(tmp_path)
        assert found is not None and found.id == f"{by}-.holder" and found.process.lives() and not found.writer
        holder.communicate("")  # it ends and gives the run up
        assert second(tmp_path, place=place) == "held"
    assert [file.name for file in tmp_path.iterdir()] == [LEASE]


def test_a_dead_holder_costs_nothing_on_its_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with -9, reaped or not, and also when its number has gone to another process since: nobody waits."""
    with held(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        while (Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
            time.sleep(0.01)
        replace_time(monkeypatch, run_lock, sleep=lambda seconds: pytest.fail(f"it waits {seconds} s"))
        run_lock.acquire(tmp_path, "again", attempt=2)
    mine = Process.this()
    recycled = lease.Lease(
        "old", 1, "", os.uname().nodename, Process(mine.pid, mine.started - 5, mine.boot, mine.namespace)
    )
    (tmp_path / LEASE).write_bytes(lease.encode(recycled))
    run_lock.refuse_held(tmp_path)


def test_a_dead_holder_that_cannot_be_seen_is_told_by_its_silence(tmp_path: Path, hurried: None) -> None:
    with held(tmp_path, place="another PID namespace") as holder:
        with pytest.raises(HeldError, match=r"is being trained by process \d+ on .*mmscale stop .* on "):
            run_lock.acquire(tmp_path, "second", attempt=2)
        holder.kill()
        holder.wait()
        began = time.monotonic()
        run_lock.acquire(tmp_path, "second", attempt=2)
        assert time.monotonic() - began >= SILENT_S


def test_a_copy_of_a_folder_is_not_held_by_the_holder_of_the_original(tmp_path: Path, hurried: None) -> None:
    with held(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        run_lock.acquire(tmp_path / "copy", "other", attempt=2)
        (tmp_path / "run").rename(tmp_path / "renamed")
        with pytest.raises(HeldError):
            run_lock.refuse_held(tmp_path / "renamed")


def test_of_many_that_start_at_once_one_holds_it(tmp_path: Path) -> None:
    """Free, given up, or left behind by a dead one: every time."""
    for _ in range(3):
        starters = [hold(tmp_path) for _ in range(4)]
        said = [process.stdout.readline() for process in starters if process.stdout is not None]
        assert sorted(line.split()[0] for line in said) == ["held", "refused", "refused", "refused"], said
        for process in starters:
            process.kill()
            process.communicate()
    assert [file.name for file in tmp_path.iterdir()] == [LEASE]


def test_two_that_follow_a_dead_one_do_not_both_succeed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pauses between its look at the dead lease and its take-over."""
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
    succeed, other = run_lock._succeed, []

    def late(*given: Any) -> bool:
        if not other:
            other.append(hold(tmp_path))
            assert other[0].stdout.readline() == "held\n"
        return succeed(*given)

    monkeypatch.setattr(run_lock, "_succeed", late)
    try:
        with pytest.raises(HeldError, match="is being trained by"):
            run_lock.acquire(tmp_path, "late", attempt=2)
    finally:
        other[0].kill()
        other[0].communicate()


def test_one_that_dies_between_claim_and_publication_is_succeeded(tmp_path: Path) -> None:
    dead = Process.of(os.getpid())
    assert dead is not None
    for number in (1, 2):
        gone = lease.Lease(
            f"gone-{number}", 1, process=Process(dead.pid, number, dead.boot, dead.namespace), token=f"t{number}"
        )
        claim = run_lock._claim(tmp_path, run_lock._NOBODY if number == 1 else "t1")
        claim.write_bytes(lease.encode(gone if number == 2 else lease.replace(gone, folder=lease.inode(tmp_path))))
        if number == 2:
            claim.write_bytes(lease.encode(lease.replace(gone, folder=lease.inode(tmp_path))))
    run_lock.acquire(tmp_path, "next", attempt=2)
    assert [file.name for file in tmp_path.iterdir()] == [LEASE]
    found = lease.owner(tmp_path)
    assert found is not None and found.id == "next"


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run_lock.acquire(tmp_path, "first", attempt=1)
    run_lock.acquire(tmp_path, "second", attempt=2)
    found = lease.owner(tmp_path)
    assert found is not None and found.attempt == 2
    assert [file.name for file in tmp_path.iterdir()] == [LEASE]


def test_a_job_takes_over_from_its_earlier_starts_and_slurm_may_know_that_one_is_over(tmp_path: Path) -> None:
    with held(tmp_path, job="7", by="launch"):
        with pytest.raises(HeldError, match="of job 7"):
            run_lock.acquire(tmp_path, "8.0.0", attempt=2, job="8")
        run_lock.refuse_held(tmp_path, job="7")
        run_lock.acquire(tmp_path, "8.0.0", attempt=2, job="8", known_dead=("launch-7.holder",))
        fence = Fence(tmp_path, "launch-7.holder", every_s=0)
        with pytest.raises(FencedError, match=r"belongs to attempt 8\.0\.0 now"):
            fence.check()
        time.sleep(4 * BEAT_S)  # the old one beats on, and changes nothing
        found = lease.owner(tmp_path)
        assert found is not None and (found.id, found.beat) == ("8.0.0", 0)


def test_ranks_of_a_killed_launch_save_before_the_next_start(tmp_path: Path, hurried: None) -> None:
    """They notice it by the process, and a second starter waits for rank 0."""
    with held(tmp_path, by="launch") as holder:
        fence = Fence(tmp_path, "launch-.holder", every_s=0)
        lease.join(tmp_path, "launch-.holder")  # this process is rank 0
        fence.check_if_due()
        assert not fence.is_orphaned()
        holder.kill()
        holder.wait()
        fence.check_if_due()
        assert fence.is_orphaned()
        refused = second(tmp_path)
        assert "rank 0 of a launch that was killed still saves and ends" in refused, refused
        lease.release(tmp_path, "launch-.holder")
        assert second(tmp_path) == "held"


def test_ranks_tell_the_death_of_a_holder_that_they_cannot_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "ORPHANED_S", 6.0)
    with held(tmp_path, by="launch", place="another PID namespace") as holder:
        fence = Fence(tmp_path, "launch-.holder", every_s=0)
        for _ in range(8):
            fence.check_if_due()
            assert not fence.is_orphaned()
            time.sleep(1.0)
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 60.0
        while not fence.is_orphaned():
            assert time.monotonic() < deadline
            time.sleep(0.2)
            fence.check_if_due()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_storage_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurried: None, number: int
) -> None:
    """Neither the attempt nor the hold on it; only a lease that is somebody else's does."""
    monkeypatch.setattr(lease, "_PAUSE_S", 0.01)
    with RunLock(tmp_path) as lock:
        lock.acquire("mine", attempt=1)
        fence = Fence(tmp_path, "mine", every_s=0)
        broken = threading.Event()
        for module, name in ((Path, "read_bytes"), (os, "open")):
            real = getattr(module, name)

            def fails(*given: Any, real: Any = real) -> Any:
                if broken.is_set() and LEASE in str(given[0]):
                    raise OSError(number, os.strerror(number), str(given[0]))
                return real(*given)

            monkeypatch.setattr(module, name, fails)
        broken.set()
        time.sleep(3 * BEAT_S)
        fence.check()
        assert not fence.is_orphaned()
        with pytest.raises((LaunchError, PermissionError)):
            run_lock.refuse_held(tmp_path)
        broken.clear()
        before = lease.owner(tmp_path)
        assert before is not None
        after = beaten(tmp_path, before.beat)
        fence.check()
        (tmp_path / LEASE).unlink()  # by a person: the holder puts it back
        fence.check()
        deadline = time.monotonic() + 60
        while (back := lease.owner(tmp_path)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert lock.lease is not None and back.token == lock.lease.token
        other = lease.replace(after, id="other", token="t", process=Process())
        (tmp_path / LEASE).write_bytes(lease.encode(other))
        with pytest.raises(FencedError, match="belongs to attempt other now"):
            fence.check()
    found = lease.owner(tmp_path)
    assert found is not None and found.id == "other"


def test_a_full_disk_stops_no_beat(tmp_path: Path, hurried: None) -> None:
    """A tmpfs of 64 KiB that is full to the last byte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode == 0
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    try:
        with RunLock(tmp_path / "run") as lock:
            lock.acquire("mine", attempt=1)
            with contextlib.suppress(OSError), (tmp_path / "full").open("wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)
            found = beaten(tmp_path / "run", 0)
            with pytest.raises(HeldError):
                run_lock._refuse_living(
                    tmp_path / "run",
                    lease.replace(found, process=Process()),  # as from another machine
                    lambda: lease.owner(tmp_path / "run"),
                    job="",
                    known_dead=(),
                )
            lease.renew(tmp_path / "run", "mine", attempt=2)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_lease_of_an_older_version_counts_by_the_number_of_its_process(tmp_path: Path, hurried: None) -> None:
    def left(pid: int, host: str) -> None:
        old = {"id": "local-1.0.0", "attempt": 1, "job": "", "host": host, "pid": pid, "time": 1.0}
        (tmp_path / LEASE).write_text(json.dumps(old) + "\n")

    left(os.getpid(), os.uname().nodename)
    with pytest.raises(HeldError):
        run_lock.refuse_held(tmp_path)
    left(2**22 + 1, os.uname().nodename)
    run_lock.refuse_held(tmp_path)
    left(os.getpid(), "elsewhere")
    began = time.monotonic()
    run_lock.acquire(tmp_path, "next", attempt=2)
    assert time.monotonic() - began >= SILENT_S
