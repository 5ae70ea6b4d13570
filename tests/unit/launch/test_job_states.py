"""SLURM's job states: the table has every name that SLURM documents."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from launch.job_states import STATES, Phase, name_of, phase_of
from launch.scheduler import JobState

# JOB STATE CODES of squeue(1) and sacct(1), SLURM 22.05.8.
MANUAL_22_05 = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PENDING", "PREEMPTED", "RUNNING", "RESV_DEL_HOLD", "REQUEUE_FED", "REQUEUE_HOLD", "REQUEUED"),
    *("RESIZING", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "TIMEOUT"),
}
# Base states and flags of https://slurm.schedmd.com/job_state_codes.html, SLURM 24.05 to 25.05.
NEWER = ["EXPEDITING", "LAUNCH_FAILED", "POWER_UP_NODE", "RECONFIG_FAIL", "UPDATE_DB"]
# "Job terminated ..." there, and those that name a failure to start: nothing of the job runs or will run.
TERMINATED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("TIMEOUT", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"),
}


def test_every_documented_state_is_in_the_table_and_nothing_else() -> None:
    assert set(STATES) == {*MANUAL_22_05, *NEWER}
    assert {state for state, meaning in STATES.items() if meaning.phase is Phase.ENDED} == TERMINATED


@pytest.mark.parametrize("page", ["squeue", "sacct"])
def test_the_manual_of_this_machine_knows_no_other(page: str) -> None:
    files = list(Path("/usr/share/man/man1").glob(f"{page}.1*"))
    if not files:
        pytest.skip(f"no manual page of {page}")
    data = files[0].read_bytes()
    text = (gzip.decompress(data) if files[0].suffix == ".gz" else data).decode()
    section = text.split('.SH "JOB STATE CODES"')[1].split(".SH ")[0]
    names = re.findall(r"^\\f[B3][A-Z]{1,3} +([A-Z_]+)\\f", section, flags=re.MULTILINE)
    assert len(names) > 10 and set(names) <= set(STATES)


@pytest.mark.parametrize("state", STATES)
def test_a_job_has_ended_as_the_table_says(state: str) -> None:
    assert JobState("1", state).ended == (state in TERMINATED)


def test_states_as_commands_print_them() -> None:
    assert name_of("CANCELLED by 1000") == "CANCELLED"
    assert name_of("OUT_OF_ME+") == "OUT_OF_MEMORY"
    assert name_of("COMPLETED") == "COMPLETED" and name_of("") == ""
    assert phase_of("CANCELLED by 0") is Phase.ENDED
    assert phase_of("A_STATE_OF_2031") is Phase.RUNNING
