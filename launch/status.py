# `mmscale status`: what a run does, from its folder and from scontrol. It prints nothing and changes nothing but one
# thing: the wait that SLURM puts before a requeued job is lifted where that is permitted.
"""State of runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch import record as records
from launch import scheduler
from launch.goodput import goodput
from launch.job import BUDGET
from mmscale.checkpoint.layout import Store
from mmscale.config.document import read_file
from mmscale.errors import ConfigError, LaunchError
from mmscale.resilience import lease
from mmscale.train.metrics import EVENTS, METRICS, read_events, read_metrics

_FINAL = {0: "finished", 2: "failed", 3: "failed", 4: "failed", 5: "gave up", 74: "failed", 75: "stopped"}


def known(folder: Path) -> list[Path]:
    """Run folders below a folder."""
    return sorted(
        entry for entry in folder.glob("*") if (entry / "config.yaml").is_file() or (entry / "launch").is_dir()
    )


def status(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """One object per run.

    Raises:
        LaunchError: a folder is no run.
    """
    return [_one(Path(run)) for run in runs]


def ended(run: Path) -> bool:
    """Whether nothing of a run is running or waiting."""
    return bool(_state(run, read_events(run))["ended"])


def _one(run: Path) -> dict[str, Any]:
    folder = records.latest(run)
    if folder is None and not any((run / name).is_file() for name in ("config.yaml", METRICS, EVENTS)):
        raise LaunchError(f"{run} is no run folder", remedy="name a folder run.dir/run.name")
    events = read_events(run)
    metrics = read_metrics(run)
    steps = _steps(run, folder)
    last: dict[str, Any] = next((line for line in reversed(metrics) if "loss" in line), {})
    state = _state(run, events)
    share, times = goodput(events, _raw(run), now=time.time())
    saved = max(Store.of_run(run).steps(), default=None)
    committed = next((e["time"] for e in reversed(events) if e["event"] == "save_committed"), None)
    step_time = last.get("step_time_s")
    done = int(last.get("step", 0))
    going = state["state"].startswith("RUNNING") and steps is not None and step_time is not None
    return {
        "run": str(run),
        **state,
        "attempt": max((int(event.get("attempt", 0)) for event in events), default=0),
        "step": done,
        "steps": steps,
        "eta_s": (steps - done) * float(step_time) if going and steps is not None and step_time is not None else None,
        "tokens_per_second": last.get("tokens_per_second"),
        "slowest_rank": _slowest(last),
        "loss": {key.removeprefix("loss/"): last[key] for key in last if key.startswith("loss/")},
        "last_checkpoint": saved,
        "last_checkpoint_age_s": None if committed is None or saved is None else max(0.0, time.time() - committed),
        "restarts": _restarts(events),
        "crashes": _crashes(folder),
        "goodput": share,
        "time": {name: round(seconds, 1) for name, seconds in times.items()} if share is not None else {},
    }


def _slowest(line: dict[str, Any]) -> dict[str, Any] | None:
    """Which rank the others waited for in a logged step, and how much longer than the median it took."""
    median, largest = line.get("rank_time_median_s"), line.get("rank_time_max_s")
    if not median or largest is None:
        return None
    return {"rank": int(line["slowest_rank"]), "over_median": round(float(largest) / float(median) - 1.0, 3)}


def _state(run: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    """state, reason, job, nodes, ended."""
    folder = records.latest(run)
    job = records.job_of(folder) if folder is not None else None
    found: dict[str, Any] = {"state": "unknown", "reason": "", "job": job or "", "nodes": "", "ended": True}
    if job is not None:
        try:
            shown = scheduler.job_state(job)
        except LaunchError as error:
            return found | {"reason": error.cause, "ended": False}
        if shown is not None and not shown.ended:
            if scheduler.lift_wait(job):
                shown = scheduler.job_state(job) or shown
            return found | {"state": shown.state, "reason": shown.reason, "nodes": shown.nodes, "ended": False}
        word = _last_word(events)
        if shown is None:
            return found | {"state": word or "ended", "reason": "SLURM does not know the job any more"}
        if shown.state == "COMPLETED":
            return found | {"state": "finished", "nodes": shown.nodes}
        if shown.state == "FAILED":
            state = _FINAL.get(shown.exit_status, f"crashed (exit status {shown.exit_status})")
            state = word if word == "unfit nodes" else state
            return found | {"state": state, "nodes": shown.nodes, "reason": _why(events) if state == "gave up" else ""}
        # A preempted job that ends within its time of grace is TIMEOUT, whatever its own last word is.
        return found | {"state": word if word in ("stopped", "finished") else shown.state, "nodes": shown.nodes}
    owner = lease.owner(run)
    if owner is not None and owner.host:
        return found | {"state": "RUNNING", "nodes": owner.host, "ended": False}
    return found | {"state": _last_word(events) or "unknown"}


def _last_word(events: list[dict[str, Any]]) -> str | None:
    """How the last attempt ended by its own account."""
    words = {
        "preflight_failed": "unfit nodes",
        "finish": "finished",
        "stop": "stopped",
        "gave_up": "gave up",
        "fault": "crashed",
    }
    for event in reversed(events):
        if event["event"] in words:
            return words[event["event"]]
        if event["event"] in ("start", "resume", "launch"):
            return None
    return None


def _why(events: list[dict[str, Any]]) -> str:
    return next((str(event.get("why", "")) for event in reversed(events) if event["event"] == "gave_up"), "")


def _restarts(events: list[dict[str, Any]]) -> int:
    return max(0, sum(event["event"] == "launch" for event in events) - 1)


def _crashes(folder: Path | None) -> int:
    try:
        return int(json.loads(((folder or Path()) / BUDGET).read_text())["restarts"])
    except (OSError, ValueError, KeyError):
        return 0


def _steps(run: Path, folder: Path | None) -> int | None:
    """Steps of the whole run, without a check of the rest of its configuration."""
    for file in (run / "config.yaml", *([folder / "config.yaml"] if folder is not None else [])):
        try:
            return int(read_file(file).data["train"]["steps"])
        except (ConfigError, ValueError, KeyError, TypeError):
            continue
    return None


def _raw(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as they were written."""
    lines = []
    file = run / METRICS
    for text in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
