# A rank without torch, for tests of the launcher: it steps, notes requests to save, writes the run's files and respects
# the lease as the trainer does. `Jobs.launch(stub=True)` has the job start it instead of `python -m mmscale train`.
"""`stub_rank.py -m mmscale train CONFIG`: trains nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from mmscale.resilience import lease
from mmscale.train.metrics import EventLog, MetricsLog

STATE = "stub.json"  # of the "checkpoint": the step and the weights that the next attempt goes on from
ENVIRONMENT = "stub_environment.json"  # of rank 0
DEAF = "STUB_DEAF"  # set: it never begins, and hears no signal
SLOW = "STUB_STEP_S"  # seconds of a step
SAVE_EVERY = 5


def stepped(weights: int, step: int) -> int:
    """Weights after a step. They depend on all steps before: one that is left out or counted twice shows for ever."""
    return (weights * 1103515245 + step) % 2**31


def losses(steps: int) -> list[float]:
    """Losses of a run that nothing happens to."""
    weights, found = 1, []
    for step in range(1, steps + 1):
        weights = stepped(weights, step)
        found.append(weights / 2**31)
    return found


def main() -> int:
    """One rank; its exit status."""
    if os.environ.get(f"MMSCALE_{DEAF}"):  # as in a rendezvous that nobody comes to
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)
    signals: list[str] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(signal.Signals(received).name))
    config = yaml.safe_load(Path(sys.argv[sys.argv.index("train") + 1]).read_text())
    run = Path(config["run"]["dir"]) / config["run"]["name"]
    rank = int(os.environ.get("SLURM_PROCID") or os.environ.get("RANK") or 0)
    fence = lease.Fence.of_rank(run, rank)
    if rank == 0:
        lease.join(run, os.environ[lease.VARIABLE])
    attempt = lease.launched_attempt(run)
    assert attempt is not None
    state = run / STATE
    step, weights = json.loads(state.read_text()).values() if state.exists() else (0, 1)
    events = EventLog(run, attempt, may_write=fence.check) if rank == 0 else None
    metrics = MetricsLog(run, attempt=attempt, may_write=fence.check) if rank == 0 else None
    if events is not None:
        events.add("resume" if state.exists() else "start", step=step, attempt_id=fence.lease_id)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / ENVIRONMENT).write_text(json.dumps(dict(os.environ)))
    steps, pause = int(config["train"]["steps"]), float(os.environ.get(f"MMSCALE_{SLOW}", "0.05"))
    while step < steps and not signals:
        time.sleep(pause)
        fence.look()
        if rank == 0 and fence.is_orphaned():
            signals.append("SIGTERM")
        step += 1
        weights = stepped(weights, step)
        if metrics is not None:
            metrics.write(step, {"loss": weights / 2**31, "step_time_s": pause, "time": time.time()})
        if events is not None and (step % SAVE_EVERY == 0 or step == steps or signals):
            fence.check()
            _save(state, step, weights)
            events.add("stub_saved", step=step)  # "save_committed" without a checkpoint is a lost folder
    if events is not None:
        if step < steps:
            fence.check()
            _save(state, step, weights)
        events.add("finish" if step == steps else "stop", step=step, signal=signals[0] if signals else None)
        if fence.is_orphaned():
            lease.release(run, os.environ[lease.VARIABLE])
    return 0 if step == steps else 75


def _save(file: Path, step: int, weights: int) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"step": step, "weights": weights}))
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
