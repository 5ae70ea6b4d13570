"""What `mmscale status` says of a run, and what a run's jobs are: from its files and SLURM's answers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from launch import chain, control, job_table, owner, status
from launch import record as records
from launch.job_states import STATES, Phase
from launch.job_table import JobTable
from launch.run_states import MEANINGS, RunState
from launch.scheduler import ExitCode, JobState
from mmscale.errors import LaunchError
from mmscale.resilience import run_lock
from mmscale.runs.events import EARLY, EventLog
from tests.module_time import replace_time
from tests.unit.launch.fake_slurm import FakeSlurm

MONDAY, TUESDAY = "2026-11-23T10:00:00", "2026-11-24T10:00:00"
ENDED = [state for state, meaning in STATES.items() if meaning.phase is Phase.ENDED]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


def launched(run: Path, *jobs: records.JobKey, steps: int = 300) -> Path:
    """A run with a launch for each job."""
    for number, job in enumerate(jobs, start=1):
        folder = run / "launch" / f"{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / records.RECORD).write_text("{}")
        (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
        records.set_job(folder, job)
    return run


def test_stages_are_listed_behind_their_run_with_steps_of_their_own(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text("train: {steps: 300}\nauxiliary: {steps: 7}\n")
    stage = tmp_path / "one" / "auxiliary"
    happened(stage, START)
    (stage / "config.yaml").write_text((tmp_path / "one" / "config.yaml").read_text())
    assert status.known(tmp_path) == [tmp_path / "one", stage, tmp_path / "two"]
    assert [one["steps"] for one in status.status(status.known(tmp_path))] == [300, 7, 300]
    (tmp_path / "auxiliary").mkdir()  # a run that is merely called so
    (tmp_path / "auxiliary" / "config.yaml").write_text("train: {steps: 300}\nauxiliary: {steps: 7}\n")
    assert shown(tmp_path / "auxiliary")["steps"] == 300


def test_successors_that_were_cancelled_do_not_say_how_the_run_ended(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    records.add_job(run / "launch" / "001", records.JobKey("8"))
    failed, cancelled = JobState("7", "FAILED", exit=ExitCode(3)), JobState("8", "CANCELLED")
    slurm.jobs(**{"7": failed, "8": cancelled})
    happened(run, ("launch", {"job": "7"}), START)
    assert (shown(run)["state"], shown(run)["job"]) == ("failed", "7")
    happened(run, ("handed_over", {"job": "8"}))  # which a person cancelled
    assert (shown(run)["state"], shown(run)["job"]) == ("cancelled", "8")
    slurm.jobs(**{"7": failed, "8": JobState("8", "PENDING")})
    found = shown(run)
    assert found["state"] == "PENDING" and not found["ended"]


def happened(run: Path, *events: tuple[str, dict[str, Any]]) -> None:
    log = EventLog(run, 1)
    for name, fields in events:
        log.add(name, **fields)


def shown(run: Path) -> dict[str, Any]:
    (found,) = status.status([run])
    return found


START = ("start", {"step": 0})
FINISH = ("finish", {"step": 300})


@pytest.mark.parametrize("state", ENDED)
def test_a_run_is_finished_by_its_own_event_at_its_last_step_and_by_nothing_else(
    slurm: FakeSlurm, tmp_path: Path, state: str
) -> None:
    """`scancel --signal=KILL --batch` leaves ExitCode 0:9, and a supervisor that ran out of memory the like."""
    run = launched(tmp_path / "run", records.JobKey("7"))
    happened(run, START)
    for code in (ExitCode(0, 9), ExitCode(0, 0), ExitCode(75, 0)):
        slurm.jobs(**{"7": JobState("7", state, exit=code)})
        found = shown(run)
        assert found["state"] != "finished" and found["ended"], (state, code)
        if STATES[state].failure:
            assert found["state"] == STATES[state].failure
    slurm.jobs(**{"7": JobState("7", "FAILED", exit=ExitCode(0, 9))})
    assert shown(run)["state"] == "killed by SIGKILL"
    happened(run, ("finish", {"step": 48}))  # train.steps was raised since
    assert shown(run)["state"] != "finished"
    happened(run, FINISH)
    slurm.jobs(**{"7": JobState("7", state, exit=ExitCode(0, 9))})
    assert shown(run)["state"] == "finished"
    happened(run, ("launch", {"launch": "001"}), ("ranks_ended", {"status": 0}))  # started again: nothing to do
    assert shown(run)["state"] == "finished"
    happened(run, ("launch", {"launch": "001"}), ("resume", {"step": 250}))  # from an older checkpoint
    assert shown(run)["state"] != "finished"


def test_an_end_on_purpose_is_told_from_one_without_an_explanation(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    slurm.jobs(**{"7": JobState("7", "COMPLETED")})
    happened(run, START)
    found = shown(run)
    assert (found["state"], found["reason"]) == (RunState.UNEXPLAINED, MEANINGS[RunState.UNEXPLAINED])
    records.ask_stop(run / "launch" / "001")  # and it ended before it had started ranks
    assert shown(run)["state"] == RunState.STOPPED
    happened(run, (EARLY, {"step": 48}))
    assert (shown(run)["state"], shown(run)["reason"]) == (RunState.ENDED_EARLY, "")


def test_a_stop_whose_save_failed_is_a_crash(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    records.ask_stop(run / "launch" / "001")
    ended = ("ranks_ended", {"status": 1, "over": True, "unsaved": True})
    happened(run, ("launch", {"launch": "001"}), START, ended)
    slurm.jobs(**{"7": JobState("7", "FAILED", exit=ExitCode(1))})
    assert shown(run)["state"] == RunState.CRASHED
    slurm.away()
    assert shown(run)["state"] == RunState.CRASHED


def test_every_state_has_one_meaning_and_a_line_on_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "slurm.md").read_text()
    assert list(MEANINGS) == list(RunState) and len(set(MEANINGS.values())) == len(MEANINGS)
    assert "".join(f"| `{state}` | {meaning} |\n" for state, meaning in MEANINGS.items()) in page
    assert not {meaning.failure for meaning in STATES.values()} & set(RunState)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("0:9", ExitCode(0, 9), "killed by SIGKILL"),
        ("75:0", ExitCode(75), "exit status 75"),
        ("0:125", ExitCode(0, 125), "killed by signal 125"),
        ("19200", ExitCode(75), "exit status 75"),  # squeue's
        ("9", ExitCode(0, 9), "killed by SIGKILL"),
        ("0:0", ExitCode(), "exit status 0"),
        ("", ExitCode(), "exit status 0"),
    ],
)
def test_exit_codes(text: str, code: ExitCode, said: str) -> None:
    assert ExitCode.parse(text) == code and str(code) == said


def test_a_crash_for_want_of_memory_is_called_so(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    cause = "out of memory: rank 3 on n1"
    happened(run, START, ("ranks_ended", {"status": 137, "cause": cause}))
    slurm.jobs(**{"7": JobState("7", "FAILED", exit=ExitCode(1))})
    assert shown(run)["state"] == cause


def test_the_accounting_is_asked_for_what_slurmctld_has_forgotten(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7", "here", "mmscale-run", MONDAY))
    happened(run, START)
    assert shown(run)["state"] == "ended"
    slurm.sacct(f"7|TIMEOUT|0:0|n1|{TUESDAY}|{TUESDAY}|mmscale-run")  # requeued on Tuesday
    assert shown(run)["state"] == "its time limit passed"
    slurm.sacct(f"7|CANCELLED by 1000|0:0|n1|{MONDAY}|{MONDAY}|mmscale-run")
    assert shown(run)["state"] == "cancelled"
    slurm.sacct(f"7|FAILED|0:125|n1|{MONDAY}|{MONDAY}|mmscale-run")
    assert shown(run)["state"] == "out of memory"
    slurm.sacct(f"7|TIMEOUT|0:0|n1|{TUESDAY}|{TUESDAY}|somebody-elses")
    assert shown(run)["reason"].startswith("number 7 is another job's now")


@pytest.mark.parametrize("state", STATES)
def test_a_job_that_may_come_back_is_stopped_and_keeps_others_away_and_one_that_cannot_does_not(
    slurm: FakeSlurm, tmp_path: Path, state: str
) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    slurm.jobs(**{"7": JobState("7", state)})
    if STATES[state].phase is Phase.ENDED:
        owner.refuse_busy(run)
        assert shown(run)["ended"]
        with pytest.raises(LaunchError, match=f"does not run: it is {state}"):
            control.stop(run)
        return
    assert shown(run)["state"] == state and not shown(run)["ended"]
    with pytest.raises(LaunchError, match=f"belongs to job 7, which is {state}"):
        owner.refuse_busy(run)
    control.stop(run)
    calls = {Phase.WAITING: ["7"], Phase.ENDING: []}
    assert slurm.calls("scancel") == calls.get(STATES[state].phase, ["--signal=USR1 --batch 7"])
    assert records.stop_asked(run / "launch" / "001")


def test_another_job_with_the_number_is_not_this_runs(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7", "here", "mmscale-run", MONDAY))
    for other in (
        JobState("7", "RUNNING", name="other", submitted=TUESDAY),  # numbers began again
        JobState("7", "RUNNING", name="mmscale-run", submitted=TUESDAY),  # a run of the same name
        JobState("7", "RUNNING", name="other", submitted=TUESDAY, restarts=1),
    ):
        slurm.jobs(**{"7": other})
        with pytest.raises(LaunchError, match="number 7 is another job's now"):
            control.stop(run)
        owner.refuse_busy(run)
        assert shown(run)["ended"] and "another job's" in shown(run)["reason"]
    assert slurm.calls("scancel") == []
    slurm.jobs(**{"7": JobState("7", "RUNNING", name="mmscale-run", submitted=TUESDAY, restarts=1)})  # requeued
    assert not shown(run)["ended"]


def test_a_job_of_another_cluster_is_left_alone(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7", "elsewhere", "mmscale-run", MONDAY))
    slurm.jobs(**{"7": JobState("7", "RUNNING", name="mmscale-run", submitted=MONDAY)})
    with pytest.raises(LaunchError, match="is of cluster elsewhere"):
        control.stop(run)
    assert slurm.calls("scancel") == []
    found = shown(run)
    assert (found["state"], found["ended"]) == ("unknown", False) and "of cluster elsewhere" in found["reason"]
    owner.refuse_busy(run)
    run_lock.acquire(run, "7.0.0", attempt=1, job="7")
    with pytest.raises(LaunchError, match="this machine cannot find out"):
        owner.refuse_busy(run)


def test_a_chain_is_shown_and_stopped_as_a_whole(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", *(records.JobKey(number) for number in ("6", "7", "8", "9")))
    slurm.jobs(
        **{"6": JobState("6", "COMPLETED"), "7": JobState("7", "RUNNING")},
        **{number: JobState(number, "PENDING", reason="Dependency") for number in ("8", "9")},
    )
    found = shown(run)
    assert (found["job"], found["state"]) == ("7", "RUNNING")
    assert {one["job"]: one["state"] for one in found["chain"]} == {"7": "RUNNING", "8": "PENDING", "9": "PENDING"}
    with pytest.raises(LaunchError, match="belongs to job 7"):
        owner.refuse_busy(run)
    stopped = control.stop(run)
    assert stopped["job"] == "7" and stopped["done"] == "asked to save and end"
    assert list(stopped["jobs"]) == ["7", "8", "9"]
    assert slurm.calls("scancel") == ["9", "8", "--signal=USR1 --batch 7"]  # the end of 7 would start 8
    asked = {folder.name: records.stop_asked(folder) for folder, _ in chain.keys(run)}
    assert asked == {"001": False, "002": True, "003": True, "004": True}


LAUNCH = ("launch", {"job": "7"})


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], status.STARTING),  # it checks its nodes
        ([LAUNCH], status.STARTING),
        ([LAUNCH, ("start", {"step": 0})], ""),
        (
            [LAUNCH, ("start", {"step": 0}), ("ranks_ended", {}), ("launch", {"job": "7", "attempt": 2})],
            status.STARTING,
        ),
        ([LAUNCH, ("start", {"step": 0}), ("finish", {"step": 300}), ("ranks_ended", {})], ""),
        ([LAUNCH, ("ranks_ended", {})], ""),
    ],
    ids=["no ranks yet", "ranks load", "trains", "restarted", "about to end", "crashed at its start"],
)
def test_a_job_whose_ranks_load_is_starting(
    slurm: FakeSlurm, tmp_path: Path, events: list[tuple[str, dict[str, Any]]], reason: str
) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    happened(run, *events)
    slurm.jobs(**{"7": JobState("7", "RUNNING")})
    assert (shown(run)["state"], shown(run)["reason"]) == ("RUNNING", reason)


def test_a_waiting_job_says_why_and_when_it_is_expected(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    slurm.jobs(**{"7": JobState("7", "PENDING", reason="Resources", start=TUESDAY)})
    assert shown(run)["reason"] == "Resources, expected start 2026-11-24 10:00:00"
    slurm.jobs(**{"7": JobState("7", "PENDING", reason="Priority")})
    assert shown(run)["reason"] == "Priority"


def test_commands_in_messages_can_be_pasted(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "my run's", records.JobKey("7"))
    slurm.jobs(**{"7": JobState("7", "COMPLETED")})
    with pytest.raises(LaunchError) as ended:
        control.stop(run)
    command = ended.value.remedy.split("`")[1]
    assert shlex.split(command) == ["mmscale", "resume", str(run)]


def test_stop_reaches_a_run_without_slurm(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", records.JobKey("7"))
    slurm.away()
    assert "through the run folder alone" in control.stop(run)["done"]
    assert records.stop_asked(run / "launch" / "001")


def test_one_question_for_all_runs_and_two_a_minute(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [launched(tmp_path / f"run{number}", records.JobKey(str(number))) for number in range(7, 10)]
    slurm.jobs(**{str(number): JobState(str(number), "RUNNING") for number in range(7, 10)})
    now = [100.0]
    replace_time(monkeypatch, job_table, monotonic=lambda: now[0])
    table = JobTable()
    for _ in range(120):  # `status --watch 0.5` for a minute
        assert [one["state"] for one in status.status(runs, table)] == ["RUNNING"] * 3
        assert not status.ended(runs[0], table)
        now[0] += 0.5
    assert len(slurm.calls("squeue")) == 2 and all("--jobs=7,8,9 " in call for call in slurm.calls("squeue"))
    assert slurm.calls("sacct") == []


def test_a_bad_folder_hides_no_other(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = launched(tmp_path / "good", records.JobKey("7"))
    slurm.jobs(**{"7": JobState("7", "RUNNING")})
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = launched(tmp_path / "torn", records.JobKey("8"))
    (torn / "lease.json").write_text("{")
    refused = tmp_path / "refused"  # all that an older version left of a submission that SLURM did not take
    (refused / "launch").mkdir(parents=True)
    odd = launched(tmp_path / "odd", records.JobKey("not-a-number"))
    found = {Path(one["run"]).name: one for one in status.status([empty, torn, refused, odd, good])}
    assert found["good"]["state"] == "RUNNING"
    assert {name: found[name]["state"] for name in ("empty", "torn", "refused")} == {
        "empty": "unreadable",
        "torn": "ended",
        "refused": "unreadable",
    }
    json.dumps(list(found.values()))
    with pytest.raises(LaunchError, match="is no run folder"):
        status.status([empty])
    assert status.known(tmp_path) == [good, odd, torn]


def test_without_an_answer_the_runs_own_word_counts(slurm: FakeSlurm, tmp_path: Path) -> None:
    over, going = (
        launched(tmp_path / name, records.JobKey(number)) for name, number in (("over", "7"), ("going", "8"))
    )
    ended = {"status": 0, "over": True}
    happened(over, ("launch", {"launch": "001"}), START, FINISH, ("ranks_ended", ended))
    happened(going, ("launch", {"launch": "001"}), START)
    local = tmp_path / "local"
    happened(local, START, FINISH)
    slurm.away()
    one, other, third = status.status([over, going, local])
    assert (one["state"], one["ended"]) == ("finished", True) and "does not answer" in one["reason"]
    assert (other["state"], other["ended"]) == ("unknown", False)
    assert (third["state"], third["reason"]) == ("finished", "")
    assert status.ended(over, JobTable()) and not status.ended(going, JobTable())
