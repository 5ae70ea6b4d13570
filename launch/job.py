# The job itself: started once by SLURM's batch script on the first node, it starts the ranks (srun), passes requests to
# save on to them, and when they have ended requeues, restarts or gives up as policy.py says. No torch, no collectives.
"""What runs inside an allocation, and for `--cluster local` on this machine.

submitit pickles a `Job`, and starts it; its own handlers of signals are replaced at once, because they requeue from one
rank while the others are killed, which no collective checkpoint survives. SLURM sends SIGUSR2 to this process alone
(`--signal=B:USR2`), so that a request is known even while no rank runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from launch import agent, batch_script, hangs, owner, passed, ranks, step
from launch import record as records
from launch.allocation import Allocation
from launch.beginning import Beginning
from launch.disk import Disk
from launch.examination import Examination
from launch.job_states import Phase, phase_of
from launch.notify import Notifier, TellingLog
from launch.policy import GAVE_UP, NO_ANSWER, STOPPED, Action, Ending, crashed, decide, known_status
from launch.progress import Progress
from launch.scheduler import UnreachableError, patiently
from launch.successors import Successors
from mmscale.checkpoint.layout import Store
from mmscale.errors import MmscaleError
from mmscale.resilience import lease
from mmscale.resilience.run_lock import RunLock
from mmscale.runtime import console
from mmscale.runtime.rank_env import unused_port
from mmscale.train.metrics import EventLog, next_attempt, read_events
from mmscale.train.scratch import start_from_scratch

_REPEAT_S = 5.0  # a request to save is repeated: it may have come before a rank could note it
_POLL_S = 0.1
_LOOK_S = 1.0  # between looks at a request to stop
_STATUSES_S = 1.0  # between looks at what agents were not told: a listing of a folder that all nodes share
_PROGRESS_S = 30.0  # between two notes of the run's progress
_FIRST_LOOK_S = 10.0  # after ranks were started
_OTHERS_S = 60.0  # after one rank has said that trying again would not help; as srun's --wait
_KILLED_S = 90.0  # a requeued job is ended by SLURM within KillWait
_NOTED = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """What submitit pickles: a path, and nothing that could go stale."""

    folder: str

    def __call__(self) -> None:
        """Run the job of this launch folder, and end with its status: submitit would turn any other end into 1."""
        raise SystemExit(main(Path(self.folder)))


def main(folder: Path) -> int:
    """Run the job of a launch folder; its exit status."""
    console.guard()
    supervisor = Supervisor(records.read_record(folder))
    try:
        with supervisor.noting_signals():
            return supervisor.run()
    except MmscaleError as error:
        if not supervisor.successors.alive():
            passed.remove_secrets(folder)
        _say(f"error: {error.cause}" + (f"\n  fix: {error.remedy}" if error.remedy else ""))
        return error.exit_status
    finally:
        supervisor.notifier.finish()
        supervisor.disk.close()


class Supervisor:
    """One start of a job: ranks, again and again, until it ends or is requeued."""

    def __init__(self, record: records.Record) -> None:
        self.record = record
        self.folder = Path(record.folder)
        self.run_dir = Path(record.run)
        self.profile = record.checked_profile()
        self.slurm = self.profile.scheduler == "slurm"
        self.job = os.environ.get("SLURM_JOB_ID", "") if self.slurm else ""
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)  # unset the first time
        self.began: float | None = round(time.time(), 3)  # of a start of the job that no attempt has been told yet
        self.bandwidth: dict[str, Any] = {}
        self.signals: list[str] = []
        self.lock = RunLock(self.run_dir, job=self.job, by="launch")
        self.disk = Disk(self.run_dir, self.folder, give_up=self._stopping)
        self.allocation = Allocation(
            self.job,
            patience_s=self.profile.slurm_patience,
            interrupted=self._stopping,
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
            stopping=self._stopping,
        )
        self.notifier = Notifier(
            self.profile.notify,
            folder=self.folder,
            facts={"run": record.run, "job": self.job, "cluster": record.cluster},
            secrets=lambda: passed.read_secrets(self.profile, self.folder),
        )
        self._stop_looked, self._stop_known = float("-inf"), False
        self._progress: Progress | None = None
        self._said = ""  # by srun, about the last start of ranks
        self._ranks: subprocess.Popen[bytes] | None = None
        self._sent = 0.0

    @contextlib.contextmanager
    def noting_signals(self) -> Iterator[None]:
        """Note requests instead of ending; they are passed on by the loop, not by the handler."""
        # nohup ignores SIGHUP. A batch script ignores requests to save only until this process listens.
        deaf = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        heard = [number for number in _NOTED if number not in deaf]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)

    def _stopping(self) -> bool:
        """Whether this process was asked to end, as far as it knows by itself."""
        return bool(self.signals) or self._stop_asked()

    def _stop_asked(self) -> bool:
        """Whether a person has asked for a stop; the file is on a file system that many share."""
        now = time.monotonic()
        if not self._stop_known and now - self._stop_looked >= _LOOK_S:
            self._stop_known, self._stop_looked = records.stop_asked(self.folder), now
        return self._stop_known

    def run(self) -> int:
        """The whole of it; returns the job's exit status.

        Raises:
            UnreachableError: SLURM has not answered for the profile's `slurm_patience`, and no rank could be started.
        """
        try:
            with self.lock:
                self._take(0, known_dead=self._refuse_busy())
                return self._run()
        except UnreachableError as error:
            if self._stopping():
                return self._end_before_ranks()
            with contextlib.closing(self._log(next_attempt(self.run_dir))) as events:
                events.add("gave_up", why=error.cause, status=error.exit_status)
            raise

    def _refuse_busy(self) -> frozenset[str]:
        """`owner.refuse_busy` for the run of this job, and for other stages of it."""
        found: frozenset[str] = frozenset()
        for folder in self.record.stage_folders:
            found |= patiently(
                lambda folder=folder: owner.refuse_busy(folder, job=self.job),  # type: ignore[misc]
                patience_s=self.profile.slurm_patience if self.slurm else 0.0,
                give_up=self._stopping,
            )
        return found

    def _take(self, number: int, *, known_dead: Collection[str] = ()) -> lease.Lease:
        """Take the run's lease for an attempt; `number`: of the start of ranks within this start of the job."""
        name = f"{self.job or f'local-{os.getpid()}'}.{self.restart}.{number}"
        return self.lock.take(name, attempt=next_attempt(self.run_dir), known_dead=known_dead)

    def _log(self, attempt: int, *, may_write: Callable[[], None] | None = None) -> EventLog:
        """The run's events, which the profile's `notify` is told of."""
        return self.disk.noted(
            TellingLog(self.disk.place(), attempt, notifier=self.notifier, may_write=may_write, writer=self.disk.writer)
        )

    def _run(self) -> int:
        batch_script.remove_stale_results(self.job)
        if (over := self.successors.end_of_run()) is not None:
            _say("an earlier job of this launch has ended the run: nothing is left to do")
            self.successors.cancel()
            return over
        if self.record.from_scratch and self.disk.first_start():  # later ones go on from what this one saves
            start_from_scratch(self.run_dir)
        lost = self.examination.lost_nodes()
        self.disk.keep(self.disk.budget())  # now: the first attempt is measured against what is there before it
        number = 0
        while True:
            if self._stopping():
                return self._end_before_ranks()
            if number == 0 and self.slurm:
                self.bandwidth = self.examination.run(Job(str(self.folder)))
                if self._interrupted():
                    continue
            taken = self.disk.patiently(functools.partial(self._take, number))
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

    def _end_before_ranks(self) -> int:
        if self.slurm and not self._stop_asked() and self.signals[-1] != "SIGUSR1":
            state = self.allocation.state(patiently_asked=True)
            if state is not None and phase_of(state) is Phase.RUNNING and state != NO_ANSWER:
                _say(f"{self.signals[-1]} before ranks were started: requeued")
                self.lock.keep = not self._requeue()
        else:
            self.successors.cancel()
        return STOPPED

    def _look_for_preemption(self) -> None:
        """Take a preemption that came before ranks could be told of it for the signal that they would have got.

        SLURM sends SIGTERM once, to the steps of a job: there may have been none yet, and the job would train on until
        its time of grace is over.
        """
        if self.allocation.preempted() and not self.signals:
            _say("preempted before ranks could be told")
            self.signals.append("SIGTERM")

    def _interrupted(self) -> bool:
        """Whether a step may have ended for what SLURM has sent it, and not for its nodes."""
        self._look_for_preemption()
        return bool(self.signals)

    # --- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, lease_id: str, attempt: int, fence: lease.Fence, events: EventLog) -> tuple[Action, int]:
        logs = self.run_dir / "logs" / f"attempt_{attempt}"
        self.disk.patiently(functools.partial(logs.mkdir, parents=True, exist_ok=True))
        # The first node, where rank 0 is, is this one.
        port = unused_port() if self.slurm else 0
        in_place = self._restarts_in_place()
        command = ranks.command(self.record, self.profile, logs=logs, environ=os.environ, port=port, in_place=in_place)
        secrets = passed.read_secrets(self.profile, self.folder)
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
        self._note_progress(fence)
        attempt = self._after_restarts_in_place(attempt, lease_id, events)
        hangs.tell(self.record, attempt, lease_id, events)
        ending = self._ending(status, attempt, logs)
        status = ending.status
        budget = self.disk.budget().ended(
            step=max(Store.of_run(self.run_dir).steps(), default=0), crashed=crashed(ending)
        )
        self.disk.keep(budget)
        ending = self._with_slurms_word(ending)
        action, why = decide(
            ending, budget, max_restarts=self._max_restarts(), max_without_progress=self.record.max_without_progress
        )
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
        )
        _say(f"ranks ended with exit status {status}: {action}, {why}")
        if over:
            passed.remove_secrets(self.disk.now(self.folder))
            self.successors.cancel()
        if action is Action.REQUEUE:
            refused = self._requeue()
            return (self._not_requeued(refused, events) if refused else action), STOPPED
        if action is Action.GIVE_UP:
            events.add("gave_up", why=why, status=status)
            _say(f"error: gave up: {why}\n  fix: look at {logs}, then `mmscale resume {self.record.run}`")
            return action, GAVE_UP
        return action, STOPPED if status != 0 and not crashed(ending) and status not in (2, 3, 4, 5) else status

    def _is_over(self, action: Action, ending: Ending) -> bool:
        """Whether no job goes on with the run: neither this one, nor one behind it."""
        if action is Action.GIVE_UP or (action is Action.END and ending.ends_run):
            return True
        return action is Action.END and not ending.left_to_slurm and not self.successors.alive()

    def _not_requeued(self, refused: str, events: EventLog) -> Action:
        """What becomes of a run whose job SLURM does not start again: the next one of its launch goes on, if any."""
        if behind := self.successors.alive():
            events.add("handed_over", job=behind[0], why=refused)
            _say(f"not requeued: {refused}; job {behind[0]} goes on")
            return Action.END
        passed.remove_secrets(self.disk.now(self.folder))
        events.add("not_requeued", why=refused)
        _say(
            f"error: not requeued: {refused}\n  fix: `mmscale resume {self.record.run}` goes on; "
            "with `chain: N` in the profile a launch submits N jobs, one behind the other"
        )
        return Action.END

    def _max_restarts(self) -> int:
        return 0 if self.profile.scheduler == "debug" else self.record.max_restarts

    def _restarts_in_place(self) -> int:
        """How often agents may start ranks again before this process looks at what became of it."""
        left = self._max_restarts() - self.disk.budget().restarts
        return max(0, min(left, self.record.max_without_progress))

    def _after_restarts_in_place(self, attempt: int, lease_id: str, events: EventLog) -> int:
        """Count restarts by agents and tell of hangs before them; the attempt that ran last.

        What comes behind it is of that attempt.
        """
        found = [event for event in read_events(self.run_dir) if event.get("attempt_id") == lease_id]
        for event in found:
            if event["event"] != "ranks_ended" or event.get("action") != agent.IN_PLACE:
                continue
            self.disk.keep(self.disk.budget().ended(step=int(event["checkpoint"]), crashed=True))
            hangs.tell(self.record, int(event["attempt"]), lease_id, events)
        last = max((int(event["attempt"]) for event in found), default=attempt)
        events.attempt = last
        return last

    def _start_until_begun(
        self, command: list[str], environment: dict[str, str], logs: Path, fence: lease.Fence, events: EventLog
    ) -> int:
        """Start the ranks and wait for their end; again if slurmctld was away and none was started.

        Raises:
            UnreachableError: it stayed away for the profile's `slurm_patience`.
        """
        while True:
            status = self._wait_for(command, environment, logs, fence, events)
            self._said = step.report(logs)
            if status == 0 or not step.never_began(logs, self._said):
                return status
            _say("no rank was started, because SLURM did not answer: tried again when it does")
            try:
                self.allocation.wait_for_slurm()
            except UnreachableError:
                if self._stopping():
                    return STOPPED
                raise
            (logs / step.LAUNCHER_LOG).unlink(missing_ok=True)

    def _wait_for(
        self, command: list[str], environment: dict[str, str], logs: Path, fence: lease.Fence, events: EventLog
    ) -> int:
        """Start the ranks and wait for their end, passing requests on to them; their exit status."""
        self._ranks = step.start(command, environment, cwd=self.record.cwd, logs=logs, slurm=self.slurm)
        self._sent = 0.0
        waits_until = float("inf")
        look_at = time.monotonic() + _FIRST_LOOK_S if self.slurm else float("inf")
        note_at = time.monotonic() + _PROGRESS_S
        beginning = Beginning(self.run_dir, events.attempt, hint_after_s=self.profile.start_hint_after)
        list_at = 0.0 if self.profile.ranks == "torchrun" else float("inf")
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self._ranks.wait(_POLL_S)
                    return agent.true_status(logs, status if status >= 0 else 128 - status)
                if time.monotonic() >= list_at:
                    list_at = time.monotonic() + _STATUSES_S
                    if agent.statuses(logs):
                        waits_until, list_at = time.monotonic() + _OTHERS_S, float("inf")
                if time.monotonic() > waits_until:  # agents would start the others again and again, without the first
                    return agent.true_status(logs, 1)
                if time.monotonic() >= note_at:
                    note_at = time.monotonic() + _PROGRESS_S
                    self._note_progress(fence)
                if time.monotonic() > look_at:  # by now the step is there, and gets what is sent
                    look_at = float("inf")
                    self._look_for_preemption()
                fence.look()
                beginning.look(events, where=environment.get("MASTER_PORT", ""))
                if self._stopping():
                    if beginning.deaf():
                        _say("the ranks have not begun, and do not hear the request to end: killed")
                        return 128 + signal.SIGKILL
                    self._ask_to_save()
        finally:
            if self._ranks.poll() is None:
                self._ranks.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._ranks.wait(5.0)
                self._ranks.kill()
                self._ranks.wait()

    def _note_progress(self, fence: lease.Fence) -> None:
        """Write down what `mmscale status` would otherwise read metrics.jsonl for, each time from its beginning."""
        if self._progress is None:
            self._progress = Progress.load(self.run_dir)
        if self._progress.update(self.run_dir):
            fence.check()
            self.disk.write(*self._progress.file(self.run_dir))

    def _ask_to_save(self) -> None:
        now = time.monotonic()
        if self._ranks is not None and now - self._sent >= _REPEAT_S:
            self._sent = now
            self._ranks.send_signal(signal.SIGUSR2)  # srun and the local launcher pass it on to every rank

    # --- after ------------------------------------------------------------------------------------------------------

    def _ending(self, status: int, attempt: int, logs: Path) -> Ending:
        """How the ranks ended: by their own word, then by what this process was sent."""
        events = [event for event in read_events(self.run_dir) if event.get("attempt") == attempt]
        named = next((event.get("signal") for event in events if event["event"] == "stop"), None)
        if "SIGUSR1" in self.signals:
            named = "SIGUSR1"
        elif self.signals:
            named = self.signals[-1]
        ending = Ending(known_status(status, events), named, records.stop_asked(self.folder))
        return replace(ending, cause=step.cause_of(logs, self._said)) if crashed(ending) else ending

    def _with_slurms_word(self, ending: Ending) -> Ending:
        """The same with SLURM's word for the job, if anything depends on it: a crash is mended without an answer."""
        if not ending.needs_slurm:
            return ending
        return replace(ending, job_state=self.allocation.state(patiently_asked=not crashed(ending)))

    def _requeue(self) -> str:
        """Have SLURM start this job again, and wait for it to end this process; why it does not, "" if it does."""
        self.signals.clear()
        self.notifier.finish()  # SLURM will end them with this job
        if refused := self.allocation.requeue():
            return refused
        deadline = time.monotonic() + _KILLED_S
        while not self.signals and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return ""


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
