"""A rank is killed, its memory is lost, and the run goes on from memory as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from mmscale.resilience import generations, guard, snapshot_files
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import Started, mmscale, start

NPROC, STEPS, LOST = 4, 40, 2
OPTIONS = [
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "checkpoint.every=0",
    "resilience.memory_every=1",
    "model.dropout=0.1",
]


def folders(run: Path) -> list[Path]:
    newest = generations.read_index(run)[-1:]
    return [snapshot_files.ROOT / name for generation in newest for name in generation.folders]


def in_memory(run: Path) -> int:
    """The newest step that every rank has committed; 0: none."""
    steps = [
        max((marker.step for marker in snapshot_files.committed(folder)[0].values()), default=0)
        for folder in folders(run)
    ]
    return min(steps, default=0)


def kill_a_rank(config: Path, run: Path, *, after: int) -> tuple[Started, int]:
    """A real run whose rank dies once a step is in memory; the command, and that step."""
    started = start("train", config, f"run.dir={run.parent}", *OPTIONS, "--nproc", str(NPROC))
    started.until(lambda: in_memory(run) >= after)
    os.kill(started.rank(LOST), signal.SIGKILL)
    ended = started.end()
    assert ended.status == 1 and "SIGKILL" in ended.err, ended
    return started, after


def losses(run: Path) -> list[str]:
    return [float.hex(record["loss"]) for record in read_metrics(run)]


@pytest.mark.long
def test_a_killed_rank_whose_memory_is_gone(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = tmp_path / "whole" / "tiny", tmp_path / "killed" / "tiny"
    ended = mmscale("train", config, f"run.dir={whole.parent}", *OPTIONS, nproc=NPROC)
    assert ended.status == 0, ended
    started, known = kill_a_rank(config, killed, after=5)
    at = folders(killed)
    try:
        # A copy of the folder is another run: what it does ends nobody's snapshots, and it does not go on from them.
        copy = Path(shutil.copytree(killed, tmp_path / "copy" / "tiny"))
        assert generations.read_index(copy) == [] and generations.read_index(killed)
        ended = mmscale("train", config, f"run.dir={copy.parent}", *OPTIONS, "train.steps=6", nproc=NPROC)
        assert ended.status == 0 and "from memory" not in ended.err, ended
        assert not any(event["event"] == "memory_restored" for event in read_events(copy))
        assert all(folder.exists() for folder in at)

        guards = [pid for pid in started.processes() if b"mmscale.resilience.guard" in command(pid)]
        assert len(guards) == NPROC  # they outlive the ranks and the command
        for pid in guards:
            if Path(f"/proc/{pid}/fd/2").readlink() == at[LOST] / snapshot_files.LOG:
                os.kill(pid, signal.SIGKILL)
        snapshot_files.remove_folder(at[LOST])

        monkeypatch.setenv("MMSCALE_TEST_COMMAND", started.mark)  # what this attempt starts is looked for too
        ended = mmscale("train", config, f"run.dir={killed.parent}", *OPTIONS, nproc=NPROC)
        assert ended.status == 0, ended
        (restored,) = [event for event in read_events(killed) if event["event"] == "memory_restored"]
        assert restored["step"] >= known and restored["rebuilt"] == [LOST]
        assert f"resumes from memory: step {restored['step']} of attempt 1, ranks [2] rebuilt" in ended.err
        (resumed,) = [event for event in read_events(killed) if event["event"] == "resume"]
        assert resumed["step"] == restored["step"]
        assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
        assert any("memory_stall_s" in record for record in read_metrics(killed))
        assert started.left_behind() == []
        assert not any(folder.exists() for folder in at) and not (killed / generations.INDEX).exists()
    finally:
        for folder in [*at, *folders(killed)]:
            guard.end(folder)


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
