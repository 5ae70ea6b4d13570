"""The `@distributed` decorator itself: every way in which ranks can end."""

import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import shared_memory
from tests.support import Ranks, distributed, run_ranks


def failure(function: Callable[..., None], *, world_size: int = 2, timeout_s: float = 60.0) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        run_ranks(function, world_size=world_size, timeout_s=timeout_s)
    return str(caught.value)


@pytest.mark.parametrize("number", [1, 2])
@distributed(world_size=3)
def test_ranks_get_fixtures_and_parameters(ranks: Ranks, number: int, tmp_path: Path) -> None:
    assert ranks.world_size == 3
    assert number in (1, 2)
    (tmp_path / str(ranks.rank)).touch()


class TestMethods:
    @distributed(world_size=2)
    def test_method(self, ranks: Ranks) -> None:
        assert isinstance(self, TestMethods)
        assert ranks.local_rank == ranks.rank


def test_every_rank_runs(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        (tmp_path / str(ranks.rank)).write_text(str(os.getpid()))

    run_ranks(body, world_size=3)
    pids = {path.read_text() for path in tmp_path.iterdir()}
    assert len(pids) == 3
    assert str(os.getpid()) not in pids


def test_failing_rank_shows_its_assertion_and_output_and_stops_the_others() -> None:
    def body(ranks: Ranks) -> None:
        if ranks.rank == 1:
            print("seen on the way")
            raise AssertionError("rank one is wrong")
        time.sleep(100)

    began = time.monotonic()
    text = failure(body)
    assert time.monotonic() - began < 90  # not the 100 s of the sleep
    assert "rank 1 of 2 failed" in text
    assert "rank one is wrong" in text
    assert "seen on the way" in text
    assert "ranks [0] were still running and were stopped" in text


def test_killed_rank() -> None:
    def body(ranks: Ranks) -> None:
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(100)

    assert "rank 0 of 2 was ended by SIGSEGV" in failure(body)


def test_exit_in_a_rank_is_a_failure() -> None:
    def body(ranks: Ranks) -> None:
        raise SystemExit(0)

    assert "SystemExit" in failure(body)


def test_hanging_ranks_are_ended_and_show_where_they_stood() -> None:
    def hangs_here(ranks: Ranks) -> None:
        time.sleep(100)

    text = failure(hangs_here, timeout_s=1.0)
    assert "ranks [0, 1] did not end within 1 s" in text
    assert "in hangs_here" in text


def test_no_process_is_left_over(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        (tmp_path / str(ranks.rank)).write_text(str(child))

    run_ranks(body, world_size=2)
    for path in tmp_path.iterdir():
        stat = Path(f"/proc/{path.read_text()}/stat")
        deadline = time.monotonic() + 60
        while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline, "a child of a rank outlived it"
            time.sleep(0.02)


def test_skip_in_a_rank_skips_the_test() -> None:
    def body(ranks: Ranks) -> None:
        if ranks.rank == 1:
            pytest.skip("not here")
        time.sleep(100)

    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(body, world_size=2)


@distributed(world_size=2)
def test_forked_ranks_can_multiply_and_reduce(ranks: Ranks) -> None:
    # The trap that conftest.py's OMP_NUM_THREADS=1 avoids: a large matmul in a forked rank.
    import torch

    from mmscale.runtime import groups

    groups.start(ranks)
    product = torch.ones(512, 512) @ torch.ones(512, 512)
    torch.distributed.all_reduce(product)
    assert float(product[0, 0]) == 1024.0


def test_signature_hides_ranks() -> None:
    import inspect

    @distributed(world_size=1)
    def example(ranks: Ranks, tmp_path: Path, x: int = 1) -> None: ...

    assert list(inspect.signature(example).parameters) == ["tmp_path", "x"]
    arguments: Any = example
    assert arguments.__name__ == "example"


def test_what_stays_in_shared_memory_is_seen() -> None:
    """Not what a living process holds, and not what is gone in a moment."""
    before = shared_memory.entries()
    file = shared_memory.ROOT / f"mmscale-test-{os.getpid()}"
    file.write_bytes(bytes(4096))
    try:
        with file.open("r+b") as opened:
            held = mmap.mmap(opened.fileno(), 4096)
        assert file.name not in shared_memory.left_behind(before, patience_s=0)
        held.close()
        assert file.name in shared_memory.left_behind(before, patience_s=0)
    finally:
        file.unlink()
    assert file.name not in shared_memory.left_behind(before, patience_s=0)
