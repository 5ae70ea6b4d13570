# The job itself. SLURM's batch script starts it once on the first node. It starts the ranks (srun), passes requests to
# save on to them, and when they have ended requeues, restarts or gives up, as policy.py decides. No torch, no
# collectives.
"""The supervisor: the process that runs inside an allocation, or for `--cluster local` on this machine.

submitit pickles a `Job` and starts it. Its signal handlers are replaced at once, because they requeue from one rank
while the others are killed, which no collective checkpoint survives. SLURM sends SIGUSR2 to this process only
(`--signal=B:USR2`), so that a request is noticed even while no rank runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch import batch_script, hangs, job_environment, owner
from launch import rank_command as ranks
from launch import record as records
from launch import srun_step as step
from launch.allocation import Allocation
from launch.disk import Disk
from launch.endings import after_restarts_in_place, ending_of, first_failed
from launch.examination import Examination
from launch.notify import Notifier, NotifyingLog
from launch.policy import (
    GAVE_UP,
    STOPPED,
    Action,
    Budget,
    Ending,
    decide,
)
from launch.rank_processes import RankProcesses
from launch.scheduler import UnreachableError, with_retries
from launch.stop_requests import StopRequests
from launch.successors import Successors
from mmscale.errors import MmscaleError, shell_command
from mmscale.resilience import lease
from mmscale.resilience.run_lock import RunLock
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EventLog, read_events
from mmscale.runtime import console
from mmscale.runtime.rank_env import unused_port
from mmscale.train.scratch import start_from_scratch


@dataclass(frozen=True)
class Job:
    """The object that submitit pickles: only a path, so that nothing in it can be outdated."""

    folder: str

    def __call__(self) -> None:
        """Run the job of this launch folder, and exit with its status; submitit would turn any other end into 1."""
        raise SystemExit(main(Path(self.folder)))


def main(folder: Path) -> int:
    """Run the job of a launch folder; returns its exit status."""
    console.guard()
    supervisor = Supervisor(records.read_record(folder))
    try:
        with job_environment.shared(supervisor.profile), supervisor.requests.noting_signals():
            status = supervisor.run()
            return supervisor.requests.status_for_slurm(status) if supervisor.slurm else status
    except MmscaleError as error:
        if not supervisor.successors.alive():
            job_environment.remove_secrets(folder)
        _say(f"error: {error.cause}" + (f"\n  fix: {error.remedy}" if error.remedy else ""))
        return error.exit_status
    finally:
        supervisor.notifier.finish()
        supervisor.disk.close()


class Supervisor:
    """One start of a job: starts ranks repeatedly until the job ends or is requeued."""

    def __init__(self, record: records.Record) -> None:
        self.record = record
        self.folder = Path(record.folder)
        self.run_dir = Path(record.run)
        self.profile = record.checked_profile()
        self.slurm = self.profile.scheduler == "slurm"
        self.job = os.environ.get("SLURM_JOB_ID", "") if self.slurm else ""
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)  # unset at the first start
        self.began: float | None = round(time.time(), 3)  # start time of the job, not yet recorded in an attempt
        self.bandwidth: dict[str, Any] = {}
        self.requests = StopRequests(self.folder)
        self.signals = self.requests.signals
        self.lock = RunLock(self.run_dir, job=self.job, by="launch")
        self.disk = Disk(self.run_dir, self.folder, give_up=self.requests.stopping)
        self.allocation = Allocation(
            self.job,
            patience_s=self.profile.slurm_patience,
            interrupted=self.requests.stopping,
        )
        self.successors = Successors(record, self.profile, self.job)
        self.examination = Examination(
            record,
            self.profile,
            self.allocation,
            self.successors,
            restart=self.restart,
            log=self._log,
            interrupted=self._interrupted,
            stopping=self.requests.stopping,
        )
        self.notifier = Notifier(
            self.profile.notify,
            folder=self.folder,
            facts={"run": record.run, "job": self.job, "cluster": record.cluster},
            secrets=lambda: job_environment.read_secrets(self.profile, self.folder),
            writer=self.disk.writer,
        )
        self._said = ""  # srun's output about the last start of ranks
        self.ranks = RankProcesses(
            record,
            self.profile,
            self.disk,
            stopping=self.requests.stopping,
            look_for_preemption=self._look_for_preemption,
            say=_say,
        )

    def run(self) -> int:
        """Run the job to its end; returns its exit status.

        Raises:
            UnreachableError: SLURM has not answered for the profile's `slurm_patience`, and no rank could be started.
        """
        try:
            with self.lock:
                self._take(0, known_dead=self._refuse_busy())
                return self._run()
        except UnreachableError as error:
            if self.requests.stopping():
                return self._end_before_ranks()
            with contextlib.closing(self._log(next_attempt(self.run_dir))) as events:
                events.add("gave_up", why=error.cause, status=error.exit_status)
            raise

    def _refuse_busy(self) -> frozenset[str]:
        """`owner.refuse_busy` for the run of this job, and for other stages of it."""
        found: frozenset[str] = frozenset()
        for folder in self.record.stage_folders:
            found |= with_retries(
                lambda folder=folder: owner.refuse_busy(folder, job=self.job),  # type: ignore[misc]
                patience_s=self.profile.slurm_patience if self.slurm else 0.0,
                give_up=self.requests.stopping,
            )
        return found

    def _take(self, number: int, *, known_dead: Collection[str] = ()) -> lease.Lease:
        """Take the run's lease for an attempt; `number`: of the start of ranks within this start of the job."""
        name = f"{self.job or f'local-{os.getpid()}'}.{self.restart}.{number}"
        return self.lock.acquire(name, attempt=next_attempt(self.run_dir), known_dead=known_dead)

    def _log(self, attempt: int, *, may_write: Callable[[], None] | None = None) -> EventLog:
        """The run's event log, which also notifies through the profile's `notify`."""
        return self.disk.noted(
            NotifyingLog(
                self.disk.place(), attempt, notifier=self.notifier, may_write=may_write, writer=self.disk.writer
            )
        )

    def _run(self) -> int:
        batch_script.remove_stale_results(self.job)
        if (over := self.successors.end_of_run()) is not None:
            _say("an earlier start of this launch has ended the run: nothing is left to do")
            self.successors.cancel()
            return over
        if self.record.from_scratch and self.disk.first_start():  # later attempts resume from its checkpoints
            start_from_scratch(self.run_dir)
        lost = self.examination.lost_nodes()
        self.disk.keep(self.disk.budget())  # read now: the first attempt's progress is measured from here
        number = 0
        while True:
            if self.requests.stopping():
                return self._end_before_ranks(counted=number > 0)
            if number == 0 and self.slurm:
                self.bandwidth = self.examination.run(Job(str(self.folder)))
                if self._interrupted():
                    continue
            taken = self.disk.with_retries(functools.partial(self._take, number))
            fence = lease.Fence(self.run_dir, taken.id)
            with contextlib.closing(self._log(taken.attempt, may_write=fence.check)) as events:
                if lost:
                    events.add("cordoned", nodes=lost, file=self.profile.cordon_file)
                    lost = {}
                action, status = self._attempt(taken.id, taken.attempt, fence, events)
            if action is Action.RETRY:
                number += 1
                continue
            self.lock.keep = action is Action.REQUEUE
            return status

    # --- before -----------------------------------------------------------------------------------------------------

    def _end_before_ranks(self, *, counted: bool = False) -> int:
        """End this start of the job; `counted`: it has started ranks, and their end is in the budget already."""
        if not self.slurm or self.requests.asked() or self.signals[-1] == "SIGUSR1":
            _say(f"a stop of this launch was requested; {shell_command('resume', self.record.run)} continues the run")
            self.successors.cancel()
            return STOPPED
        ending = self.allocation.with_state(Ending(STOPPED, self.signals[-1]))
        before = self.disk.budget()
        action, why = self._decide(ending, before if counted else self.disk.count(ending, before))
        if action is Action.GIVE_UP:
            self.successors.cancel()
            job_environment.remove_secrets(self.folder)
            with contextlib.closing(self._log(next_attempt(self.run_dir))) as events:
                return self._give_up(why, STOPPED, self.run_dir / "logs", events)
        if action is Action.REQUEUE:
            _say(f"{self.signals[-1]} before ranks were started: requeued")
            self.lock.keep = not self._requeue(ending)
        return STOPPED

    def _look_for_preemption(self) -> None:
        """Record the signal of a preemption that arrived before any rank could receive it.

        SLURM sends SIGTERM once, to the steps of a job. If there was no step yet, the job would train until the end of
        its grace period. A job that SLURM is ending, because a node has failed, learns it here before its signal: a
        check of nodes that ended for that has no result.
        """
        if self.allocation.taken_away() and not self.signals:
            _say("SLURM revoked the nodes before the ranks could be notified")
            self.signals.append("SIGTERM")

    def _interrupted(self) -> bool:
        """Whether a step may have ended because of a signal from SLURM, and not because of its nodes."""
        self._look_for_preemption()
        return bool(self.signals)

    # --- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, lease_id: str, attempt: int, fence: lease.Fence, events: EventLog) -> tuple[Action, int]:
        logs = self.run_dir / "logs" / f"attempt_{attempt}"
        self.disk.with_retries(functools.partial(logs.mkdir, parents=True, exist_ok=True))
        # This is the first node, where rank 0 runs.
        port = unused_port() if self.slurm else 0
        in_place = self._restarts_in_place()
        command = ranks.command(self.record, self.profile, logs=logs, environ=os.environ, port=port, in_place=in_place)
        secrets = job_environment.read_secrets(self.profile, self.folder)
        environment = secrets | ranks.environment(self.profile, os.environ, lease_id=lease_id, port=port, logs=logs)
        events.add(
            "launch",
            attempt_id=lease_id,
            launch=self.folder.name,
            job=self.job,
            restart=self.restart,
            nodes=os.environ.get("SLURM_JOB_NODELIST", os.uname().nodename),
            world_size=self.record.world_size,
            **({"since": self.began} if self.began is not None else {}),
            **({"all_reduce_gb_s": self.bandwidth} if self.bandwidth else {}),
        )
        self.began, self.bandwidth = None, {}
        _say(f"attempt {attempt} ({lease_id}): {shlex.join(command)}")
        try:
            status = self._start_until_begun(command, environment, logs, fence, events)
            fence.check()
        except lease.FencedError as error:
            _say(f"error: {error.cause}")
            return Action.END, error.exit_status
        self.ranks.note_progress(fence)
        attempt = after_restarts_in_place(self.record, self.disk, self.run_dir, attempt, lease_id, events)
        hangs.record_hang(self.record, attempt, lease_id, events)
        ending = self._ending(status, attempt, logs)
        status = ending.status
        before = self.disk.budget()
        self.disk.count(ending, before)  # a crash is counted even if SLURM ends this process before it answers
        ending = self.allocation.with_state(ending)
        budget = self.disk.count(ending, before)
        action, why = self._decide(ending, budget)
        over = self._is_over(action, ending)
        events.add(
            "ranks_ended",
            attempt_id=lease_id,
            status=status,
            signal=ending.signal,
            action=action,
            why=why,
            over=over,
            **({"cause": ending.cause} if ending.cause else {}),
            **({"failed": asdict(ending.failed)} if ending.failed else {}),
            **({"unsaved": True} if ending.unsaved else {}),
        )
        _say(f"ranks ended with exit status {status}: {action}, {why}")
        if over:
            job_environment.remove_secrets(self.disk.now(self.folder))
            self.successors.cancel()
        if action is Action.REQUEUE:
            refused = self._requeue(ending)
            return (self._not_requeued(refused, events), ending.exit_status) if refused else (action, STOPPED)
        if action is Action.GIVE_UP:
            return action, self._give_up(why, status, logs, events)
        return action, ending.exit_status

    def _decide(self, ending: Ending, budget: Budget) -> tuple[Action, str]:
        most = self.record.max_without_progress
        return decide(ending, budget, max_restarts=self._max_restarts(), max_without_progress=most)

    def _give_up(self, why: str, status: int, logs: Path, events: EventLog) -> int:
        events.add("gave_up", why=why, status=status)
        _say(f"error: gave up: {why}\n  fix: look at {logs}, then {shell_command('resume', self.record.run)}")
        return GAVE_UP

    def _is_over(self, action: Action, ending: Ending) -> bool:
        """Whether no job will continue the run: neither this one nor one behind it."""
        if action is Action.GIVE_UP or (action is Action.END and ending.ends_run):
            return True
        return action is Action.END and not ending.left_to_slurm and not self.successors.alive()

    def _not_requeued(self, refused: str, events: EventLog) -> Action:
        """The action if SLURM does not requeue the job: the next job of its launch continues, if there is one."""
        if behind := self.successors.alive():
            events.add("handed_over", job=behind[0], why=refused)
            _say(f"not requeued: {refused}; job {behind[0]} continues")
            return Action.END
        job_environment.remove_secrets(self.disk.now(self.folder))
        events.add("not_requeued", why=refused)
        _say(
            f"error: not requeued: {refused}\n  fix: {shell_command('resume', self.record.run)} continues the run; "
            "with `chain: N` in the profile a launch submits N jobs, one behind the other"
        )
        return Action.END

    def _max_restarts(self) -> int:
        return 0 if self.profile.scheduler == "debug" else self.record.max_restarts

    def _restarts_in_place(self) -> int:
        """How often agents may restart ranks before this process checks the result."""
        left = self._max_restarts() - self.disk.budget().restarts
        return max(0, min(left, self.record.max_without_progress))

    def _start_until_begun(
        self, command: list[str], environment: dict[str, str], logs: Path, fence: lease.Fence, events: EventLog
    ) -> int:
        """Start the ranks and wait for their end; repeat if slurmctld was down and none was started.

        Raises:
            UnreachableError: it stayed down for the profile's `slurm_patience`.
        """
        while True:
            status = self.ranks.run(command, environment, logs, fence, events)
            self._said = step.report(logs)
            if status == 0 or not step.never_began(logs, self._said):
                return status
            _say("no rank was started, because SLURM did not answer: tried again when it does")
            try:
                self.allocation.wait_for_slurm()
            except UnreachableError:
                if self.requests.stopping():
                    return STOPPED
                raise
            (logs / step.LAUNCHER_LOG).unlink(missing_ok=True)

    # --- after ------------------------------------------------------------------------------------------------------

    def _ending(self, status: int, attempt: int, logs: Path) -> Ending:
        """How the ranks ended, by their own record first, then by the signals to this process."""
        events = [event for event in read_events(self.run_dir) if event.get("attempt") == attempt]
        by_agents = self.slurm and self.profile.ranks == "torchrun"
        return ending_of(
            status,
            events,
            signals=self.signals,
            failed=first_failed(self.record, by_agents=by_agents, logs=logs, events=events, said=self._said),
            stop_asked=records.stop_asked(self.folder),
            cause=lambda: step.cause_of(logs, self._said),
        )

    def _requeue(self, ending: Ending) -> str:
        """Have this job requeued: by its end, or at once. Returns the reason for a refusal, "" on success."""
        self.signals.clear()
        self.notifier.finish()  # SLURM will end them with this job
        budget = self.disk.budget()
        if ending.preempted and self.allocation.requeued_at_end(before=budget.by_slurm):
            _say("slurmctld requeues a preempted job when it ends")
            self.disk.keep(replace(budget, by_slurm=budget.by_slurm + 1))
            return ""
        return self.allocation.requeue()


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
