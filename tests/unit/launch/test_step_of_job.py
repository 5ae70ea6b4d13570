"""What srun says of a step: it was never started, or a rank ran out of memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from launch import scheduler
from launch import srun_step as step
from launch.scheduler import UnreachableError, with_retries
from mmscale.errors import LaunchError
from tests.module_time import replace_time

AWAY = "srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller (connect failure)\n"


def test_a_step_that_slurmctld_did_not_start_is_no_crash(tmp_path: Path) -> None:
    said = AWAY + "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 7\n"
    assert step.never_began(tmp_path, said)
    assert not step.never_began(tmp_path, "srun: error: Unable to create step: More processors requested\n")
    (tmp_path / "rank_0.log").touch()
    assert not step.never_began(tmp_path, said)


@pytest.mark.parametrize(
    ("said", "printed", "cause"),
    [
        ("srun: error: n2: task 3: Out Of Memory\n", "", "out of memory: rank 3 on n2"),
        ("srun: error: n1: tasks 0-1: Out Of Memory\n", "", "out of memory: rank 0-1 on n1"),
        ("", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n", "out of memory: rank 0"),
        ("", "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=7.0.\n", "out of memory: rank 0"),
        ("srun: error: n1: task 0: Killed\n", "a rank's own words about an oom_kill\n", ""),
    ],
)
def test_out_of_memory(tmp_path: Path, said: str, printed: str, cause: str) -> None:
    (tmp_path / "rank_0.log").write_text(f"step 1\n{printed}")
    assert step.cause_of(tmp_path, said) == cause


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)",
        "Unexpected message received for job 1",  # of `scontrol requeue`, 22.05
        "squeue: error: fetch_config: DNS SRV lookup failed",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "error: If munged is up, restart with --num-threads=10\nerror: Munge encode failed: Failed to access socket",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
    ],
)
def test_an_outage_is_told_from_an_answer(said: str) -> None:
    assert scheduler.no_answer(said)


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Invalid job id specified",
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
        "Requested operation is presently disabled for job 7",
        "Access/permission denied for job 7",
    ],
)
def test_a_refusal_is_an_answer(said: str) -> None:
    assert not scheduler.no_answer(said)


def test_questions_are_repeated_until_there_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], [0.0]
    replace_time(
        monkeypatch,
        scheduler,
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )

    def ask() -> str:
        asked.append(now[0])
        if now[0] < 300:
            raise UnreachableError("away")
        return "here"

    assert with_retries(ask, patience_s=1800) == "here"
    pauses = [round(later - earlier) for earlier, later in itertools.pairwise(asked[1:])]
    assert pauses == sorted(pauses) and (pauses[0], pauses[-1]) == (1, 60) and len(pauses) < 12
    now[0] = 0.0
    with pytest.raises(UnreachableError):
        with_retries(ask, patience_s=100)
    assert now[0] <= 100
    now[0] = 0.0
    with pytest.raises(UnreachableError, match="asked to end"):
        with_retries(ask, patience_s=1800, give_up=lambda: now[0] > 5)
    assert now[0] < 6

    def refuse() -> None:
        raise LaunchError("Invalid job id specified")

    with pytest.raises(LaunchError, match="Invalid"):
        with_retries(refuse, patience_s=1800)


def test_a_command_that_slurmctld_left_in_its_answer_has_none() -> None:
    with pytest.raises(UnreachableError, match="SLURM does not answer"):
        scheduler.run(["bash", "-c", "kill -PIPE $$"])
    with pytest.raises(LaunchError) as refused:
        scheduler.run(["bash", "-c", "echo 'Access/permission denied' >&2; exit 1"])
    assert not isinstance(refused.value, UnreachableError)
