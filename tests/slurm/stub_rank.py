# A rank without torch, for tests of the launcher: like the trainer it takes steps, records requests to save, writes the
# run's files and respects the lease. With `Jobs.launch(stub=True)` the job starts it instead of `mmscale train`.
"""`stub_rank.py -m mmscale train CONFIG`: trains nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from mmscale.resilience import lease
from mmscale.runs.attempts import settings_name
from mmscale.runs.events import EventLog
from mmscale.train.log.metrics_log import MetricsLog

STATE = "stub.json"  # file of the "checkpoint": step and weights from which the next attempt continues
ENVIRONMENT = "stub_environment.json"  # file with the environment of rank 0
DEAF = "STUB_DEAF"  # if set, it never begins, and ignores signals
SLOW = "STUB_STEP_S"  # seconds of a step
# RANK:STEP:END[,...]: how ranks end after a step, once; END is an exit status or the name of a signal.
END = "STUB_END"
WAIT = "wait"
# STEP:FILE: ranks wait after this step until the file exists, so that a test can act during training on a machine of
# any speed.
HOLD = "STUB_HOLD"
FAIL = "STUB_FAIL"  # how rank 0 ends instead of recording a requested stop; values as for END
SAVE_EVERY = 5


def stepped(weights: int, step: int) -> int:
    """Weights after a step. They depend on all previous steps, so a missing or repeated one is visible forever."""
    return (weights * 1103515245 + step) % 2**31


def losses(steps: int) -> list[float]:
    """Losses of an uninterrupted run."""
    weights, found = 1, []
    for step in range(1, steps + 1):
        weights = stepped(weights, step)
        found.append(weights / 2**31)
    return found


def below_agent() -> int:
    """One rank of one of torchrun's agents, started as by the agent; returns its exit status for the agent."""
    from launch import agent

    agent.runpy.run_module = lambda *_, **__: sys.exit(main())  # type: ignore[attr-defined,assignment,misc]
    return agent.main(sys.argv[sys.argv.index("launch.agent") + 1 :])


def planned_ends(rank: int, attempt: int) -> dict[int, str]:
    """How this rank ends, by step. Without a planned end it waits, as in a collective, for the rank that has one."""
    wanted = [one.split(":") for one in os.environ.get(f"MMSCALE_{END}", "").split(",") if one]
    own = {int(step): end for number, step, end in wanted if int(number) == rank}
    return own or {int(step): WAIT for _, step, _ in wanted if attempt == 1}


def end_once(how: str, mark: Path) -> None:
    """End this process, or wait until another process ends it.

    Args:
        how: an exit status, the name of a signal, or WAIT.
        mark: a file that shows that this rank has already ended once. The number of the attempt does not show it,
            because agents restart a rank before rank 0 has begun the next attempt.
    """
    if how == WAIT:
        time.sleep(600)
    if mark.exists():
        return
    mark.touch()
    if how.isdigit():
        sys.exit(int(how))
    os.kill(os.getpid(), signal.Signals[f"SIG{how}"])


def hold(step: int, signals: list[str]) -> None:
    """Wait for the test, or for a stop request."""
    wanted, _, file = os.environ.get(f"MMSCALE_{HOLD}", "0:").partition(":")
    while step == int(wanted) and not Path(file).exists() and not signals:
        time.sleep(0.05)


def noted_signals() -> list[str]:
    """Names of received signals, from now on.

    SIGTERM ends a rank whose neighbour failed, because it cannot save alone.
    """
    signals: list[str] = []
    ours = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    if os.environ.get(f"MMSCALE_{END}"):
        ours.remove(signal.SIGTERM)
    for number in ours:
        signal.signal(number, lambda received, _: signals.append(signal.Signals(received).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ours, signal.SIGTERM})  # agents start ranks with these signals blocked
    return signals


class Records:
    """The files that rank 0 writes into the run's folder.

    Args:
        run: the folder.
        attempt: number of this one.
        fence: of this rank.
    """

    def __init__(self, run: Path, attempt: int, fence: lease.Fence) -> None:
        self.run, self.fence = run, fence
        self.events = EventLog(run, attempt, may_write=fence.check)
        self.metrics = MetricsLog(run, attempt=attempt, may_write=fence.check)

    def begin(self, config: dict[str, Any], step: int, *, resumed: bool) -> None:
        self.events.add("resume" if resumed else "start", step=step, attempt_id=self.fence.lease_id)
        for name in ("config.yaml", settings_name(self.events.attempt)):
            (self.run / name).write_text(yaml.safe_dump(config))
        (self.run / ENVIRONMENT).write_text(json.dumps(dict(os.environ)))

    def step(self, step: int, weights: int, pause: float) -> None:
        self.metrics.write(step, {"loss": weights / 2**31, "step_time_s": pause, "time": time.time()})

    def save(self, step: int, weights: int) -> None:
        self.fence.check()
        temporary = (self.run / STATE).with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "weights": weights}))
        temporary.replace(self.run / STATE)
        # "save_committed" without a checkpoint would mean that a folder was lost.
        self.events.add("stub_saved", step=step)

    def end(self, step: int, *, finished: bool, signals: list[str]) -> None:
        self.events.add("finish" if finished else "stop", step=step, signal=signals[0] if signals else None)
        if self.fence.is_orphaned():
            lease.release(self.run, os.environ[lease.VARIABLE])


def main() -> int:
    """Run one rank; returns its exit status."""
    if os.environ.get(f"MMSCALE_{DEAF}"):  # as in a rendezvous that no other rank joins
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)
    signals = noted_signals()
    config = yaml.safe_load(Path(sys.argv[sys.argv.index("train") + 1]).read_text())
    run, steps = Path(config["run"]["dir"]) / config["run"]["name"], int(config["train"]["steps"])
    if "--stage" in sys.argv:
        from mmscale.train.stages.table import STAGES

        stage = STAGES[sys.argv[sys.argv.index("--stage") + 1]]
        section, _, key = stage.steps.partition(".")
        run, steps = stage.folder(run), int(config[section][key])
    by_srun = os.environ.get("MMSCALE_LAUNCHER") == "slurm"  # nothing is set on this machine
    rank = int(os.environ.get("SLURM_PROCID" if by_srun else "RANK", "0"))
    fence = lease.Fence.of_rank(run, rank)
    if rank == 0:
        lease.join(run, os.environ[lease.VARIABLE])
    attempt = lease.launched_attempt(run)
    assert attempt is not None
    planned = planned_ends(rank, attempt)
    # Attempt > 1, because rank 0 of this attempt may have saved before this rank begins.
    resumed = attempt > 1 and (run / STATE).exists()
    step, weights = json.loads((run / STATE).read_text()).values() if resumed else (0, 1)
    records = Records(run, attempt, fence) if rank == 0 else None
    if records is not None:
        records.begin(config, step, resumed=resumed)
    pause = float(os.environ.get(f"MMSCALE_{SLOW}", "0.05"))
    while step < steps and not signals:
        time.sleep(pause)
        fence.check_if_due()
        if rank == 0 and fence.is_orphaned():
            signals.append("SIGTERM")
        step += 1
        weights = stepped(weights, step)
        if records is not None:
            records.step(step, weights, pause)
            if step % SAVE_EVERY == 0 or step == steps or signals:
                records.save(step, weights)
        hold(step, signals)
        if step in planned:
            end_once(planned[step], run / f"stub_ended_{rank}")
    if records is not None:
        if step < steps and (failure := os.environ.get(f"MMSCALE_{FAIL}")):
            end_once(failure, run / "stub_failed")
        records.end(step, finished=step == steps, signals=signals)
    return 0 if step == steps else 75


if __name__ == "__main__":
    sys.exit(below_agent() if "launch.agent" in sys.argv else main())
