"""A rank fails, and the others are ended for that: its own exit status decides, and it is named. Ranks are stubs."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.runtime.rank_env import expand_hostlist
from tests.slurm.jobs import Jobs, shown
from tests.slurm.stub_rank import END

# How ranks end, and the one that is named: its number and status, whether the run is restarted, and the words for it.
# The other rank waits for it, and is ended. Below agents all ranks end with a status that a restart would not change.
ROWS: dict[str, list[tuple[str, int, int, bool, str]]] = {
    "srun": [
        ("1:6:1", 1, 1, True, "exit status 1"),
        ("1:6:KILL", 1, 137, True, "killed by SIGKILL"),
        ("1:6:3", 1, 3, False, "exit status 3"),
    ],
    "torchrun": [
        ("1:6:1", 1, 1, True, "exit status 1"),
        ("1:6:KILL", 1, 137, True, "killed by SIGKILL"),
        ("0:6:3,1:6:3", 0, 3, False, "exit status 3"),
    ],
}


@pytest.mark.parametrize("ranks", ["srun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_the_first_rank_that_failed_is_named_and_decides(jobs: Jobs, ranks: str) -> None:
    asked = jobs.with_profile(ranks=ranks, keep=["MASTER_ADDR", "PYTHON_EXEC"])
    for number, (ends, *_) in enumerate(ROWS[ranks]):
        more: dict[str, Any] = {"nodes": 2, "slow_s": 0.2, "stub": True, "environment": {f"MMSCALE_{END}": ends}}
        asked.launch("train.steps=10", f"run.name=row-{number}", **more)
    for run, (_, rank, status, restarted, said) in zip(jobs.runs, ROWS[ranks], strict=True):
        job = run.until_ended()
        first: dict[str, Any] = run.events("ranks_ended")[0]
        node = expand_hostlist(run.events("launch")[0]["nodes"])[rank]
        failed = first["failed"]
        assert (failed["ranks"], failed["node"], failed["status"]) == (str(rank), node, status), run.report()
        actions = [event["action"] for event in run.events("ranks_ended")]
        assert len(actions) == len(run.events("launch"))
        if restarted:
            assert actions == ["retry" if ranks == "srun" else "in_place", "end"], run.report()
            assert f"rank {rank} on {node}: {said}" in first["why"]
            assert shown(run)["state"] == "finished" and shown(run)["crashes"] == 1
        else:
            assert actions == ["end"] and first["status"] == status and first["over"]
        assert job.exit_status == (0 if restarted else status) and job.restarts == 0, run.report()
