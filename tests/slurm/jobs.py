# Launches real jobs on the local cluster and watches them through their run folders and scontrol. Everything is polled
# with a long deadline, because machines that run these tests are small and shared.
"""Jobs of the SLURM tests."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import chain, scheduler, status, submit
from mmscale.checkpoint.layout import Store
from mmscale.errors import LaunchError
from mmscale.resilience import inject, lease
from mmscale.runs.events import read_events
from mmscale.runs.metrics import METRICS, read_metrics
from slurm.local.cluster import Cluster
from tests.slurm.stub_rank import SLOW

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "configs/cluster/test.yaml"
DEADLINE_S = 400.0  # a start of ranks took 76 s on a machine with ten times as many processes as cores
POLL_S, ASK_S = 0.2, 1.0  # interval of reads of the run's files, and of queries to SLURM, which start processes
# Values that must not depend on interruptions; all others are times and numbers of attempts.
EXACT = ("tokens", "loss", "loss/text", "loss/image", "z_loss", "grad_norm", "lr", "output_norm")


@dataclass
class Run:
    """A launched run."""

    folder: Path
    job: str
    cluster: Cluster

    def state(self) -> scheduler.JobState:
        found = scheduler.with_retries(lambda: scheduler.job_state(self.job), patience_s=60)
        assert found is not None
        return found

    def step(self) -> int:
        lines = read_metrics(self.folder)
        return int(lines[-1]["step"]) if lines else 0

    def attempt(self) -> int:
        return max((int(line["attempt"]) for line in read_metrics(self.folder)), default=0)

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if not names or event["event"] in names]

    def checkpoints(self) -> list[int]:
        return Store.of_run(self.folder).steps()

    def until(self, condition: Callable[[], bool], what: str, *, lift: bool = True) -> None:
        """Wait until a condition holds; meanwhile remove the delay of a requeued job, as `mmscale status` does."""
        deadline, ask_at = time.monotonic() + DEADLINE_S, 0.0
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen: {what}\n{self.report()}"
            if lift and time.monotonic() >= ask_at:
                scheduler.lift_wait(self.job, self.state())
                ask_at = time.monotonic() + ASK_S
            time.sleep(POLL_S)

    def until_step(self, step: int, *, attempt: int | None = None) -> None:
        """Wait until a step is logged, by that attempt or a later one."""

        ask_at = 0.0

        def there() -> bool:
            nonlocal ask_at
            if time.monotonic() >= ask_at:
                assert not self.state().ended, self.report()
                ask_at = time.monotonic() + ASK_S
            return self.step() >= step and self.attempt() >= (attempt or 0)

        self.until(there, f"step {step} of attempt {attempt}")

    def until_ended(self) -> scheduler.JobState:
        self.until(lambda: self.state().ended, "the job ends")
        return self.state()

    def rank(self, number: int, *, below_agent: bool = False) -> int:
        """Process id of a rank of the attempt that owns the run; with agents, of the first rank of a node."""
        owner = lease.owner(self.folder)
        assert owner is not None
        wanted = {f"{lease.VARIABLE}={owner.id}".encode(), f"SLURM_PROCID={number}".encode()}
        wanted |= {b"LOCAL_RANK=0"} if below_agent else set()
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or not wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    continue
                if b"train" in (entry / "cmdline").read_bytes().split(b"\0"):
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        ranks = [pid for pid, parent in found.items() if parent not in found and not _is_srun(pid)]
        assert len(ranks) == 1, (found, self.report())
        return ranks[0]

    def report(self) -> str:
        """Information for finding out why a test failed."""
        parts: list[str] = []
        with contextlib.suppress(LaunchError):  # slurmctld may be down
            parts = [str(scheduler.job_state(self.job))]
        parts = [*parts, str(self.events()[-8:])]
        files = (*self.folder.glob("launch/*/submitit/*_log.out"), *sorted(self.folder.glob("logs/*/rank_*.log")))
        parts += [f"--- {file}\n{file.read_text(errors='replace')[-2500:]}" for file in files]
        return "\n".join(parts)


def _is_srun(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "srun"


@dataclass
class Jobs:
    """Runs of one test."""

    cluster: Cluster
    config: Path
    profile: Path
    folder: Path
    runs: list[Run] = field(default_factory=list)

    def with_profile(self, **settings: Any) -> Jobs:
        """The same with other settings of the profile; the runs of both are ended at the end of the test."""
        content = yaml.safe_load(self.profile.read_text()) | {"cordon_file": str(self.folder / "cordoned.txt")}
        profile = self.folder / "profile.yaml"
        profile.write_text(yaml.safe_dump(content | settings))
        return dataclasses.replace(self, profile=profile)

    def launch(
        self,
        *overrides: str,
        nodes: int = 2,
        slow_s: float = 0.05,
        hold_after: int | None = None,
        faults: str = "",
        after: str | None = None,
        stub: bool = False,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Run:
        """Submit a run.

        Args:
            overrides: settings.
            nodes: with one rank each.
            slow_s: added to each step, so that a test can act during training.
            hold_after: after this step ranks wait until `go_on`, however long SLURM takes for what the test asks of it.
            faults: as MMSCALE_FAULTS.
            after: as `--after`.
            stub: ranks are stub_rank.py, which imports no torch.
            environment: more variables of the launching shell.
            more: of `plan_launch`.
        """
        planned = submit.plan_launch(
            self.config,
            [f"run.dir={self.folder}", *overrides],
            cluster=str(self.profile),
            nodes=nodes,
            after=after is not None,
            **more,
        )
        wanted = [f"*:*:step:slow={slow_s}"] if slow_s else []
        wanted += [faults] if faults else []
        if hold_after is not None:
            self.held.touch()
            wanted.append(f"*:{hold_after}:step:wait={self.held}")
        variables = {inject.VARIABLE: ",".join(wanted), **(environment or {})}
        if stub:
            variables |= {f"MMSCALE_{SLOW}": str(slow_s), "PYTHON_EXEC": self._stub()}  # the latter is read by torchrun
            planned = [
                dataclasses.replace(one, record=dataclasses.replace(one.record, python=self._stub())) for one in planned
            ]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            found = submit.launch(planned, after=after)
        launched = [Run(Path(one["run"]), one["job"], self.cluster) for one in found]
        self.runs += launched
        return launched[0]

    @property
    def held(self) -> Path:
        """While this file exists, ranks wait after the step `hold_after`."""
        return self.folder / "held"

    def go_on(self) -> None:
        """Let the ranks of `hold_after` train on."""
        self.held.unlink()

    def _stub(self) -> str:
        """An interpreter that starts the stub instead of a rank."""
        file = self.folder / "python"
        # Not written again, because a job may be starting it and would then do nothing and end with 0.
        if file.exists():
            return str(file)
        stub = f'exec {sys.executable} {ROOT}/tests/slurm/stub_rank.py "$@"'
        ranks = f'case "$2 $3 $4" in mmscale*|"-m launch.agent rank") {stub};; esac'
        file.write_text(f'#!/bin/bash\n{ranks}\nexec {sys.executable} "$@"\n')
        file.chmod(0o755)
        return str(file)

    def end_all(self) -> None:
        """End all jobs of this test, so that none is alive during the next one."""
        for run in self.runs:
            for job in dict.fromkeys([*(key.id for _, key in reversed(chain.keys(run.folder))), run.job]):
                with contextlib.suppress(LaunchError):
                    scheduler.cancel(str(job), signal="KILL", batch_only=False)
                with contextlib.suppress(LaunchError):
                    scheduler.cancel(str(job))


def assert_equal(run: Run, reference: list[dict[str, Any]]) -> None:
    """Every step exists, with the values of an uninterrupted run."""
    mine = read_metrics(run.folder)
    assert [line["step"] for line in mine] == [line["step"] for line in reference], run.report()
    for one, other in zip(mine, reference, strict=True):
        for key in EXACT:
            assert one.get(key) == other.get(key), (one["step"], key, one.get(key), other.get(key))


def steps_done_again(run: Run) -> int:
    """Lines of metrics.jsonl beyond the first of each step."""
    lines = [line for line in (run.folder / METRICS).read_text().splitlines() if '"loss"' in line]
    return len(lines) - len({line.split('"step": ')[1].split(",")[0] for line in lines})


def shown(run: Run) -> dict[str, Any]:
    """The output of `mmscale status`."""
    (found,) = status.status([run.folder])
    return found
