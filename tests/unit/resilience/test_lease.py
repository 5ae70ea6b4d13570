"""One attempt owns a run; who has lost it learns so before it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.errors import LaunchError
from mmscale.resilience import lease, run_lock
from mmscale.resilience.lease import LEASE, VARIABLE, Fence, FencedError
from mmscale.runs.events import EventLog, read_events


def test_whoever_takes_a_run_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert lease.owner(run) is None
    first = run_lock.acquire(run, "7.0.0", attempt=1, job="7")
    assert lease.owner(run) == first and first.process.lives() and first.host
    run_lock.acquire(run, "7.1.0", attempt=2, job="7")
    found = lease.owner(run)
    assert found is not None and (found.id, found.attempt) == ("7.1.0", 2)
    assert [file.name for file in run.iterdir()] == [LEASE]


def test_only_the_owner_gives_it_up_or_renews_it(tmp_path: Path) -> None:
    run_lock.acquire(tmp_path, "7.1.0", attempt=2)
    lease.release(tmp_path, "7.0.0")
    with pytest.raises(FencedError, match=r"belongs to attempt 7\.1\.0 now, and not to 7\.0\.0"):
        lease.renew(tmp_path, "7.0.0", attempt=3)
    found = lease.owner(tmp_path)
    assert found is not None and (found.id, found.attempt) == ("7.1.0", 2)
    lease.renew(tmp_path, "7.1.0", attempt=3)
    assert lease.launched_attempt(tmp_path, {VARIABLE: "7.1.0"}) == 3
    assert (
        lease.launched_attempt(tmp_path, {VARIABLE: "7.0.0"}) is None and lease.launched_attempt(tmp_path, {}) is None
    )
    lease.release(tmp_path, "7.1.0")
    assert lease.owner(tmp_path) is None
    with pytest.raises(FencedError, match="belongs to attempt nobody"):
        lease.renew(tmp_path, "7.1.0", attempt=4)


def test_an_old_attempt_writes_no_event(tmp_path: Path) -> None:
    run_lock.acquire(tmp_path, "7.0.0", attempt=1)
    fence = Fence.of_rank(tmp_path, 0, {VARIABLE: "7.0.0"})
    events = EventLog(tmp_path, 1, may_write=fence.check)
    events.add("start")
    run_lock.acquire(tmp_path, "7.1.0", attempt=2)
    with pytest.raises(FencedError, match=r"belongs to attempt 7\.1\.0 now; this one, 7\.0\.0, ends"):
        events.add("save_committed", step=3)
    assert [event["event"] for event in read_events(tmp_path)] == ["start"]
    lease.release(tmp_path, "7.1.0")
    with pytest.raises(FencedError, match=r"7\.1\.0"):  # also when the one that took over has given it up
        fence.check()
    (tmp_path / LEASE).unlink()  # no word of another one
    fence.check()


def test_it_looks_now_and_then_but_checks_every_time(tmp_path: Path) -> None:
    run_lock.acquire(tmp_path, "7.0.0", attempt=1)
    fence = Fence(tmp_path, "7.0.0", every_s=3600)
    fence.check_if_due()
    run_lock.acquire(tmp_path, "7.1.0", attempt=2)
    fence.check_if_due()
    with pytest.raises(FencedError):
        fence.check()
    with pytest.raises(FencedError):
        Fence(tmp_path, "7.0.0", every_s=0).check_if_due()


def test_without_a_launcher_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("torn {")
    fence = Fence.of_rank(tmp_path, 0, {})
    fence.check_if_due()
    fence.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "7"}', "7"])
def test_a_damaged_lease_is_an_error_in_words(tmp_path: Path, content: str) -> None:
    (tmp_path / LEASE).write_text(content)
    with pytest.raises(LaunchError, match=r"lease\.json cannot be read"):
        lease.owner(tmp_path)
