"""States of runs.

`mmscale status`: the state of a run, from its folder and from SLURM. It prints nothing, and changes only one thing: it
removes SLURM's delay of a requeued job if SLURM permits it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import budget as budgets
from launch import chain, owner, scheduler
from launch import record as records
from launch.goodput import goodput
from launch.job_states import STATES, Phase
from launch.job_table import JobTable
from launch.run_states import MEANINGS, RunState
from mmscale import bounded
from mmscale.checkpoint.layout import Store
from mmscale.config.document import read_file
from mmscale.errors import ConfigError, LaunchError, MmscaleError, shell_command
from mmscale.resilience import lease
from mmscale.resilience.held_snapshots import held_step
from mmscale.runs.events import BEGINS, EARLY, EVENTS, read_events
from mmscale.runs.is_run import NAME_ANOTHER, no_run
from mmscale.runs.last_step import last_step
from mmscale.runs.run_progress import RunProgress
from mmscale.train.stages.table import STAGES, of_folder

STARTING = "starting"  # no attempt of the holder has begun to train
_FINAL = dict.fromkeys((2, 3, 4, 74), RunState.FAILED) | {5: RunState.GAVE_UP, 75: RunState.STOPPED}
# How an attempt ended, by its last event. `finish` counts at the last step only.
_WORDS = {
    "preflight_failed": RunState.UNFIT_NODES,
    "stop": RunState.STOPPED,
    "gave_up": RunState.GAVE_UP,
    "fault": RunState.CRASHED,
    EARLY: RunState.ENDED_EARLY,
}
# Recorded by the run itself; they take precedence over SLURM's state of the job.
_OWN_WORDS = (
    RunState.FINISHED,
    RunState.ENDED_EARLY,
    RunState.STOPPED,
    RunState.UNFIT_NODES,
    RunState.GAVE_UP,
)


def known(folder: Path) -> list[Path]:
    """Run folders below a folder, each followed by those of its stages, which may have stages too."""
    found = []
    for run in sorted(entry for entry in folder.glob("*") if _is_run(entry)):
        found += [run, *_stages_of(run)]
    return found


def _stages_of(run: Path) -> list[Path]:
    found = []
    for place in (stage.folder(run) for stage in STAGES.values() if stage.subfolder):
        if _is_run(place) or (place / EVENTS).is_file():
            found += [place, *_stages_of(place)]
    return found


def _is_run(folder: Path) -> bool:
    try:
        named = (folder / "config.yaml").is_file() or any((folder / "launch").glob("[0-9]*"))
        return named or owner.of(folder) is not None
    except OSError:  # shown as unreadable
        return True


def status(runs: Iterable[Path], table: JobTable | None = None) -> list[dict[str, Any]]:
    """One object per run or stage. SLURM is queried once for all; an unreadable run does not hide the others.

    Args:
        runs: their folders.
        table: cached answers of SLURM, for repeated calls; None: SLURM is queried now.

    Raises:
        LaunchError: a folder is not a run, and it is the only one.
    """
    folders = [Path(run) for run in runs]
    jobs = _jobs(folders, table or JobTable())
    found = []
    for run in folders:
        try:
            found.append(_one(run, jobs[run]))
        except (MmscaleError, OSError, *bounded.BAD_CONTENT) as error:
            if len(folders) == 1 and isinstance(error, MmscaleError):
                raise
            if len(folders) == 1 and isinstance(error, PermissionError):
                raise LaunchError(f"{run}: {_said(error)}") from None
            found.append(_unreadable(run, error))
    return found


def ended(run: Path, table: JobTable) -> bool:
    """Whether no job of a run runs or waits. SLURM is not queried if the run itself has recorded its end."""
    events = read_events(run)
    if _over(run, events):
        return True
    return bool(_state(run, events, _jobs([run], table)[run])["ended"])


@dataclass(frozen=True)
class _Jobs:
    """The jobs of a run.

    Attributes:
        links: of its chain, in the order of their launches.
        error: why their states are unknown; "" if SLURM has answered.
    """

    links: Sequence[chain.Link] = ()
    error: str = ""


def _jobs(runs: Sequence[Path], table: JobTable) -> dict[Path, _Jobs]:
    """Jobs of all runs, with one query; removes the delay of a requeued one."""
    readable = [run for run in runs if _readable(run)]
    try:
        found = chain.links_of(readable, table)
    except LaunchError as error:
        asked = {run for run in readable if chain.keys(run)}
        return {run: _Jobs(error=error.cause if run in asked else "") for run in runs}
    for link in (link for links in found.values() for link in links):
        if link.state is not None and scheduler.lift_wait(link.key.id, link.state):
            table.forget()
    return {run: _Jobs(found.get(run, ())) for run in runs}


def _readable(run: Path) -> bool:
    try:
        chain.keys(run)
    except OSError:
        return False
    return True


def _unreadable(run: Path, error: Exception) -> dict[str, Any]:
    """The object for a run that cannot be read."""
    said = error.cause if isinstance(error, MmscaleError) else _said(error)
    nothing: dict[str, Any] = dict.fromkeys(_FIELDS)
    shown = {
        "run": str(run),
        "state": RunState.UNREADABLE,
        "reason": said,
        "job": "",
        "nodes": "",
        "ended": True,
        "chain": [],
    }
    return nothing | shown | {"attempt": 0, "step": 0, "loss": {}, "restarts": 0, "crashes": 0, "time": {}}


def _said(error: Exception) -> str:
    if isinstance(error, PermissionError):
        command = shell_command("-R", "g+rX", error.filename, program="chmod")
        return f"no permission to read {error.filename}: ask its owner for {command}"
    return f"{type(error).__name__}: {error}"


def _one(run: Path, jobs: _Jobs) -> dict[str, Any]:
    folder = records.latest(run)
    if folder is None and owner.of(run) is None and (cause := no_run(run)):
        raise LaunchError(cause, remedy=NAME_ANOTHER)
    events = read_events(run)
    progress = _progress(run)
    steps = _steps(run, folder)
    last = progress.last
    state = _state(run, events, jobs)
    held = owner.of(run)
    number = held.attempt if held is not None and not state["ended"] else 0
    known = [float(one["time"]) for one in (*events, last) if isinstance(one.get("time"), int | float)]
    # A killed run without a launcher has no event for its end, so its time ends with the last line that it wrote.
    now = max(known) if state["ended"] and known else time.time()
    saved = max(Store.of_run(run).steps(), default=None)
    kept = (held_step(run, above=saved or 0) or saved or 0) if state["ended"] else None
    share, times = goodput(events, progress.groups(), now=now, resumes_from=kept)
    committed = next((e["time"] for e in reversed(events) if e["event"] == "save_committed"), None)
    step_time = last.get("step_time_s")
    done = last_step(events, logged=int(last.get("step", 0)), attempt=int(last.get("attempt", 0)))
    going = (
        state["state"].startswith("RUNNING")
        and state["reason"] != STARTING
        and steps is not None
        and step_time is not None
    )
    return {
        "run": str(run),
        **state,
        "attempt": max([number, *(int(event.get("attempt", 0)) for event in events)]),
        "step": done,
        "steps": steps,
        "eta_s": (steps - done) * float(step_time) if going and steps is not None and step_time is not None else None,
        "tokens_per_second": last.get("tokens_per_second"),
        "slowest_rank": _slowest(last),
        "loss": _losses(run, last),
        "loss_step": int(last["step"]) if "step" in last else None,
        "last_checkpoint": saved,
        "last_checkpoint_age_s": None if committed is None or saved is None else max(0.0, time.time() - committed),
        "mirror": _mirror(events),
        "restarts": _restarts(events),
        "crashes": _crashes(folder),
        "goodput": share,
        "time": {name: round(seconds, 1) for name, seconds in times.items()} if share is not None else {},
    }


_FIELDS = (
    *("steps", "eta_s", "tokens_per_second", "slowest_rank", "last_checkpoint", "last_checkpoint_age_s", "mirror"),
    *("loss_step", "goodput"),
)


def _mirror(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest checkpoint in `checkpoint.mirror`, and why it lags behind; None: nothing was mirrored yet."""
    uploads = [event for event in events if str(event["event"]).startswith("mirror_")]
    if not uploads:
        return None
    # The newest is uploaded first, older ones that are kept follow.
    done = [(event.get("attempt", 0), event.get("step", 0)) for event in uploads if event["event"] == "mirror_uploaded"]
    problem = "" if uploads[-1]["event"] == "mirror_uploaded" else str(uploads[-1].get("reason", ""))
    return {"step": max(done)[1] if done else None, "problem": problem}


@functools.lru_cache(maxsize=1000)
def _known_progress(run: Path) -> RunProgress:
    return RunProgress.load(run)


def _progress(run: Path) -> RunProgress:
    """A run's present progress. A process that calls this again reads only new lines."""
    found = _known_progress(run)
    found.update(run)
    return found


def _losses(run: Path, line: dict[str, Any]) -> dict[str, float]:
    """The losses of a logged step by modality; of a stage that has none of them, its loss."""
    found = {key.removeprefix("loss/"): _number(line[key]) for key in line if key.startswith("loss/")}
    return found or ({of_folder(run).loss: _number(line["loss"])} if "loss" in line else {})


def _slowest(line: dict[str, Any]) -> dict[str, Any] | None:
    """The rank that the others waited for in a logged step, and its excess over the median."""
    rank, median, largest = (line.get(name) for name in ("slowest_rank", "rank_time_median_s", "rank_time_max_s"))
    if not median or largest is None or rank is None:
        return None
    return {"rank": int(rank), "over_median": round(float(largest) / float(median) - 1.0, 3)}


def _number(value: Any) -> float:
    """A figure of metrics.jsonl, where values that are not finite are words; NaN if it is not a figure."""
    try:
        return float(value)
    except bounded.BAD_CONTENT:
        return math.nan


def _state(run: Path, events: list[dict[str, Any]], jobs: _Jobs) -> dict[str, Any]:
    """state, reason, job, nodes, chain, ended."""
    found: dict[str, Any] = {
        "state": RunState.UNKNOWN,
        "reason": "",
        "job": "",
        "nodes": "",
        "chain": [],
        "ended": True,
    }
    held = owner.of(run)
    if held is not None and not held.job and owner.is_held(run, held):
        reason = "" if owner.has_begun(events, held) else STARTING
        return found | {"state": "RUNNING", "reason": reason, "nodes": held.host, "ended": False}
    if jobs.error:
        over = _over(run, events)
        word = _last_state(run, events) if over else None
        return found | {"state": word or RunState.UNKNOWN, "reason": jobs.error, "ended": over}
    if jobs.links:
        living = chain.alive(jobs.links)
        started = [str(event["job"]) for event in events if "job" in event]
        shown = living[0] if living else chain.last(jobs.links, started)
        found |= {"job": shown.key.id, "chain": [_of_chain(link) for link in living]}
        if shown.alive and shown.state is not None:
            now = shown.state
            hint = events[-1].get("why", "") if events and events[-1]["event"] == "not_begun" else ""
            reason = ", ".join(filter(None, (now.reason or hint, _expected(now))))
            if not reason and now.phase is Phase.RUNNING and owner.job_is_starting(events, shown.key.id):
                reason = STARTING
            return found | {"state": now.state, "reason": reason, "nodes": now.nodes, "ended": False}
        if shown.elsewhere and not _over(run, events):
            return found | {"reason": shown.note, "ended": False}
        state, reason = _how_it_ended(run, events, shown)
        return found | {"state": state, "reason": reason, "nodes": shown.state.nodes if shown.state else ""}
    if held is not None and not held.job:
        gone = f"process {held.process.pid} on {held.host} is gone, and has not said how it ended"
        return found | {"state": _last_state(run, events) or RunState.KILLED, "reason": gone, "nodes": held.host}
    return found | {"state": _last_state(run, events) or RunState.UNKNOWN}


def _expected(state: scheduler.JobState) -> str:
    """When a waiting job is expected to start, if SLURM has planned that far."""
    planned = state.phase is Phase.WAITING and state.start[:1].isdigit()
    return f"expected start {state.start.replace('T', ' ')}" if planned else ""


def _of_chain(link: chain.Link) -> dict[str, str]:
    assert link.state is not None
    return {"job": link.key.id, "state": link.state.state, "reason": link.state.reason}


def _how_it_ended(run: Path, events: list[dict[str, Any]], link: chain.Link) -> tuple[str, str]:
    """State and reason of a run whose last job has ended.

    The run's own record takes precedence over SLURM's state: a preempted job that ends in its grace period is a
    TIMEOUT, and a killed batch script has exit status 0.
    """
    word, state = _last_state(run, events), link.state
    reason = _why(events) if word == RunState.GAVE_UP else ""
    if word in _OWN_WORDS:
        return word, reason
    if state is None:
        return word or RunState.ENDED, link.note or "SLURM does not know the job any more"
    if failure := STATES[state.state].failure if state.state in STATES else "":
        return failure, f"job {state.state}"
    if state.exit.signal:
        return str(state.exit), f"job {state.state}"
    if state.state == "COMPLETED" and records.stop_asked(link.folder):  # before ranks could record it
        return RunState.STOPPED, reason
    if state.state == "COMPLETED":
        return RunState.UNEXPLAINED, MEANINGS[RunState.UNEXPLAINED]
    return _FINAL.get(state.exit.status, word or f"{RunState.CRASHED} ({state.exit})"), reason


def _over(run: Path, events: list[dict[str, Any]]) -> bool:
    """Whether a run has recorded its end, and has not been launched since."""
    if not events or lease.owner(run) is not None:
        return False
    last: dict[str, Any] = next((e for e in reversed(events) if e["event"] in ("ranks_ended", "launch")), {})
    newest = records.latest(run)
    launched = next((event["launch"] for event in reversed(events) if "launch" in event), None)
    return bool(last.get("over")) and newest is not None and newest.name == launched


def _last_state(run: Path, events: list[dict[str, Any]]) -> str | None:
    """How the last attempt ended, by its own record. It is `finished` only at the run's last step."""
    nothing_to_do = False  # an attempt that found the run finished
    for event in reversed(events):
        name = event["event"]
        if name == "finish":
            steps = _steps(run, records.latest(run))
            return RunState.FINISHED if steps is None or int(event.get("step", steps)) >= steps else None
        if name in _WORDS:
            return _WORDS[name]
        if name == "ranks_ended":
            nothing_to_do = event.get("status") == 0
            if "cause" in event or event.get("unsaved"):
                return str(event.get("cause", RunState.CRASHED))
        if name in BEGINS or (name == "launch" and not nothing_to_do):
            return None
    return None


def _why(events: list[dict[str, Any]]) -> str:
    return next((str(event.get("why", "")) for event in reversed(events) if event["event"] == "gave_up"), "")


def _restarts(events: list[dict[str, Any]]) -> int:
    """How often the run started again by itself: after a requeue or a crash, or in another job of the same launch."""
    starts = [event.get("launch") for event in events if event["event"] == "launch"]
    by_hand = {launch for launch in starts if launch is not None}  # restarts in place name none
    return len(starts) - max(len(by_hand), min(1, len(starts)))


def _crashes(folder: Path | None) -> int:
    found = budgets.load(folder) if folder is not None else None
    return found.restarts if found is not None else 0


def _steps(run: Path, folder: Path | None) -> int | None:
    """Steps of the whole run or stage, without a check of the rest of its configuration."""
    section, _, name = of_folder(run).steps.partition(".")
    for file in (run / "config.yaml", *([folder / "config.yaml"] if folder is not None else [])):
        try:
            return int(read_file(file).data[section][name])
        except (ConfigError, ValueError, KeyError, TypeError):
            continue
    return None
