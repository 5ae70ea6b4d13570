"""`mmscale train` and `verify-layout`: they find the rank, call train/, and print the result."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.arguments import ConfigFile, Overrides
from mmscale.cli.output import Json, emit, pairs
from mmscale.cli.stage import FromScratch, OfStage, StageName
from mmscale.errors import TrainingError
from mmscale.runtime.activity import ActivityReporter
from mmscale.runtime.rank_env import RankEnv

if TYPE_CHECKING:
    from mmscale.config import Config
    from mmscale.train.stages.table import Stage as StageEntry

# Exit status of local ranks if layouts differ; their parent would report 1 as a crash.
_DIFFERS = TrainingError.exit_status


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", metavar="N", min=1, show_default=False, help="Start N ranks on this machine."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Continue even if the objective or the data changed since the checkpoint.")
    ] = False,
    stage: OfStage = StageName.MAIN,
    from_scratch: FromScratch = False,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            min=1.0,
            show_default="signal_delay of a launch's profile, else 60",
            help="Grace period after a stop request: a save that hangs is given up after half of it, and a new one "
            "is made.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, starting from the run's newest checkpoint if there is one.

    Without --nproc it joins the ranks that SLURM, torchrun or mpirun started.

    Exit status: 0 finished, 2 usage or configuration, 3 data, 4 no usable checkpoint, 5 training gave up, 74
    checkpoints cannot be written, 75 stopped on request after a save.
    """
    from mmscale.config.load import load
    from mmscale.runtime import console
    from mmscale.train import training_lock
    from mmscale.train.stages.table import STAGES

    console.guard()
    loaded = load(config, overrides or ())
    entry = STAGES[stage]
    main_run = Path(loaded.run.dir) / loaded.run.name
    folder = entry.folder(main_run)
    starts = ranks.starts_ranks(nproc)
    env = RankEnv() if starts else ranks.own_rank(nproc)
    if env.world_size == 1:  # in a process group the first rank refuses on behalf of all
        training_lock.refuse_held(main_run, entry)
    if from_scratch:
        from mmscale.train.scratch import start_from_scratch

        start_from_scratch(folder, first=env.is_first)
    if starts:
        assert nproc is not None
        entry.preflight(loaded, world_size=nproc, yes=yes)  # printed once here instead of by every rank
        _exit_if_done(entry, loaded, as_json=as_json)
        raise typer.Exit(_start_ranks(nproc, main_run, entry))
    if env.is_first and not training_lock.is_launched():  # a wrong path is named before torch has been loaded
        entry.preflight(loaded, world_size=env.world_size, yes=yes)
        if env.world_size == 1:  # other ranks would wait for this one
            _exit_if_done(entry, loaded, as_json=as_json)
    with (
        training_lock.claimed(main_run, entry, env) as claim,
        ActivityReporter("loading torch and megatron-core", enabled=env.is_first) as starting,
    ):
        from mmscale.train import run

        status = run.main(loaded, env, stage=entry.name, yes=yes, grace_s=grace, starting=starting, claim=claim)
    if env.is_first and as_json:
        _emit(folder, status)
    raise typer.Exit(status)


def _exit_if_done(entry: StageEntry, config: Config, *, as_json: bool) -> None:
    """End the command if nothing is left to train, before anything is loaded or written."""
    from mmscale.train.already_done import already_done

    if said := already_done(entry, config):
        typer.echo(said, err=True)
        if as_json:
            _emit(entry.folder(Path(config.run.dir) / config.run.name), 0)
        raise typer.Exit


def _emit(folder: Path, status: int) -> None:
    from mmscale.runs.metrics import read_metrics

    records = read_metrics(folder)
    result = {"run": str(folder), "exit_status": status, "last": records[-1] if records else None}
    emit(result, as_json=True, text=lambda: None)


def _start_ranks(nproc: int, run: Path, stage: StageEntry) -> int:
    """Train with local ranks; returns their exit status. Holds the run's lease unless a launch's job holds it."""
    from mmscale.resilience.lease import VARIABLE, launched_attempt
    from mmscale.runs.attempts import next_attempt
    from mmscale.train import training_lock

    folder = stage.folder(run)
    with contextlib.ExitStack() as stack:
        environ = dict(os.environ)
        if not training_lock.is_launched():
            environ[VARIABLE] = stack.enter_context(training_lock.held(run, stage))
        attempt = launched_attempt(folder, environ) or next_attempt(folder)
        return ranks.start(nproc, log_dir=folder / "logs" / f"attempt_{attempt}", environ=environ)


def verify_layout(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to compare.")] = 3,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", metavar="N", min=1, show_default=False, help="Ranks; default: the least that the layout needs."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a parallel layout with one process: losses, gradient norms, and the gradient of every tensor.

    The layout and one process each save a checkpoint after step 1, below run.dir, and all tensors of both are compared.
    The layout then resumes from the checkpoint of the one process. Exit status 1 if they differ.
    """
    from mmscale.config import derived, rules
    from mmscale.config.load import load

    loaded = load(config, overrides or ())
    if nproc is None:
        nproc = derived.least_ranks(loaded)
    rules.check(loaded, world_size=nproc)
    if ranks.starts_ranks(nproc):
        logs = Path(tempfile.mkdtemp(prefix="mmscale-verify-"))
        status = ranks.start(nproc, log_dir=logs)
        shutil.rmtree(logs)  # not reached after a crash; then the logs are kept and the error names them
        raise typer.Exit(1 if status == _DIFFERS else status)
    env = ranks.own_rank(nproc)
    from mmscale.train.proof import verify_layout as comparing

    result = comparing.verify_layout(loaded, steps=steps)
    if env.is_first:
        emit(result, as_json=as_json, text=lambda: _verdict(result))
    if not result["passed"]:
        raise typer.Exit(_DIFFERS if env.source == "local" else 1)


def _verdict(result: dict[str, Any]) -> None:
    layout = ", ".join(f"{name} {size}" for name, size in result["layout"].items() if size is not None)
    rows = [
        ("layout", layout),
        ("steps", result["steps"]),
        ("loss differs by", f"{result['loss_difference']:.2e}"),
        ("gradient norm differs by", f"{result['grad_norm_difference']:.2e} of it"),
        ("tolerance", f"{result['tolerance']:.0e}"),
        ("gradients differ by", _worst(result["gradients"])),
        ("weights and state differ by", _worst(result["state"])),
        *([] if result["choices"] is None else [("choices that differ", _choices(result["choices"]))]),
        ("verdict", "equal to one process" if result["passed"] else "NOT EQUAL to one process"),
    ]
    pairs(rows)


def _choices(part: dict[str, Any]) -> str:
    """The share of token choices that differ from those of one process, which the first step repeats."""
    return f"{part['difference']:.2%} of {part['compared']:,} (tolerance {part['tolerance']:.0%})"


def _worst(part: dict[str, Any]) -> str:
    """The tensor with the largest difference relative to its norm, and the tensors beyond the tolerance."""
    number = len(part["differ"])
    found = f"{part['difference']:.2e}, {part['worst']} ({part['compared']} tensors, tolerance {part['tolerance']:.0e})"
    return found if number == 0 else f"{found}; beyond it: {', '.join(part['differ'])}"
