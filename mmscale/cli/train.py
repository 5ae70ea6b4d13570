# `mmscale train`, `eval` and `verify-layout`: the commands that compute.
# They find the rank, call train/ or inference/, and print what comes back.
"""Commands that train and evaluate."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.output import Json, Overrides, console, emit, pairs
from mmscale.cli.stage import FromScratch, OfStage, Stage
from mmscale.errors import TrainingError, UsageError
from mmscale.runtime.rank_env import RankEnv

if TYPE_CHECKING:
    from mmscale.train.stages.table import Stage as StageEntry

_ROUTINGS = (
    "batch",
    "causal",
    "top1",
    "threshold",
)  # mmscale.model.mixed_modal.Routing, which costs an import of torch
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
# What local ranks say to the process that started them; with 1 they would be reported as crashed.
_DIFFERS = TrainingError.exit_status


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", metavar="N", min=1, show_default=False, help="Start N ranks on this machine."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Go on although the objective or the data changed since the checkpoint.")
    ] = False,
    stage: OfStage = Stage.MAIN,
    from_scratch: FromScratch = False,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            min=1.0,
            show_default="signal_delay of a launch's profile, else 60",
            help="How long a request to stop leaves: a save that hangs then is given up after half of it, and a new "
            "one is made.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, from the run's newest checkpoint if there is one.

    Without --nproc it joins the ranks that SLURM, torchrun or mpirun started.

    Exit status: 0 finished, 2 usage or configuration, 3 data, 4 no usable checkpoint, 5 training gave up,
    74 checkpoints cannot be written, 75 stopped on request after a save.
    """
    from mmscale.config.load import load
    from mmscale.runtime import console
    from mmscale.train import holding
    from mmscale.train.metrics import read_metrics
    from mmscale.train.stages.table import STAGES

    console.guard()
    loaded = load(config, overrides or ())
    entry = STAGES[stage]
    main_run = Path(loaded.run.dir) / loaded.run.name
    folder = entry.folder(main_run)
    starts = ranks.starts_ranks(nproc)
    env = RankEnv() if starts else ranks.own_rank(nproc)
    if env.world_size == 1:  # ranks that meet are refused by their first one, all of them
        holding.refuse_held(main_run, entry)
    if from_scratch:
        from mmscale.train.scratch import start_from_scratch

        start_from_scratch(folder, first=env.is_first)
    if starts:
        assert nproc is not None
        entry.preflight(loaded, world_size=nproc, yes=yes)  # said once here, and not by every rank
        raise typer.Exit(_start_ranks(nproc, main_run, entry))
    from mmscale.train import run

    status = run.main(loaded, env, stage=entry.name, yes=yes, grace_s=grace)
    if env.is_first and as_json:
        records = read_metrics(folder)
        result = {"run": str(folder), "exit_status": status, "last": records[-1] if records else None}
        emit(result, as_json=True, text=lambda: None)
    raise typer.Exit(status)


def _start_ranks(nproc: int, run: Path, stage: StageEntry) -> int:
    """Train as local ranks, holding the run for them unless the job of a launch does; their exit status."""
    from mmscale.resilience.lease import VARIABLE, launched_attempt
    from mmscale.train import holding
    from mmscale.train.metrics import next_attempt

    folder = stage.folder(run)
    with contextlib.ExitStack() as stack:
        environ = dict(os.environ)
        if not holding.is_launched():
            environ[VARIABLE] = stack.enter_context(holding.held(run, stage))
        attempt = launched_attempt(folder, environ) or next_attempt(folder)
        return ranks.start(nproc, log_dir=folder / "logs" / f"attempt_{attempt}", environ=environ)


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|HF_DIR",
            help="Run folder (newest checkpoint unless a step is named), or a folder of `convert to-hf`.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", show_default=False, help="Prepared data set; default: the run's held-out split."
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="MODE",
            show_default="batch; of an export: what its config.json says",
            help="batch: experts choose among all tokens, later ones too; causal: auxiliary routers decide; top1: they "
            "pick one expert per token; threshold: averaged cut-offs decide.",
        ),
    ] = None,
    batches: Annotated[
        int | None, typer.Option("--batches", min=1, show_default=False, help="Stop after N batches.")
    ] = None,
    nproc: ranks.OnRanks = None,
    as_json: Json = False,
) -> None:
    """Loss and perplexity of each modality on held-out data, and accuracy where the data has a task.

    An export is computed by transformers, without the network and without the code in its folder.
    """
    folder, step = split_step(run)
    if routing is not None and routing not in _ROUTINGS:
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(_ROUTINGS)}")
    if (folder / "config.json").is_file():
        if routing == "batch":
            raise UsageError(
                "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
            )
        ranks.refuse(nproc, "an export")
        from checkpoints_tools.hf_evaluate import evaluate_export

        result = evaluate_export(folder, step=step, data=data, batches=batches, routing=routing)
    else:
        if ranks.starts_ranks(nproc):
            raise typer.Exit(ranks.start_for_a_while(nproc))
        from mmscale.inference.evaluate import evaluate_run
        from mmscale.model.mixed_modal import Routing

        chosen, shared = Routing(routing or "batch"), ranks.shared(nproc)
        options: dict[str, Any] = {} if shared is None else {"env": shared}
        result = evaluate_run(folder, step=step, data=data, batches=batches, routing=chosen, **options)
        result.setdefault("routing", chosen.value)
        if shared is not None and not shared.is_first:
            return
    emit(result, as_json=as_json, text=lambda: _evaluation(result))


def split_step(text: str) -> tuple[Path, int | None]:
    """`runs/x@100` -> (runs/x, 100).

    Raises:
        UsageError: what stands behind the @ is no step.
    """
    folder, at, step = text.rpartition("@")
    if not at:
        return Path(text), None
    if step.isdigit():
        return Path(folder), int(step)
    if "/" in step or Path(text).exists():  # the @ belongs to the path
        return Path(text), None
    raise UsageError(f"{text}: {step!r} behind the @ is not a step", remedy=f"write a number, e.g. {folder}@100")


def _evaluation(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("measured", "value", "routing"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for key, value in result.items():
        if isinstance(value, float):
            table.add_row(key, f"{value:.4f}", result["routing"])
    for key, value in result.get("batch", {}).items():
        table.add_row(key, f"{value:.4f}", "batch")
    for key, value in result.get("gap", {}).items():
        table.add_row(f"gap in {key}", f"{value:+.4f}", f"{result['routing']} - batch")
    shown = console()
    others = {key: value for key, value in result.items() if isinstance(value, str | int) and key != "routing"}
    pairs(others.items())
    shown.print(table)
    if result.get("routers"):
        shown.print("auxiliary routers against the choice of batch routing:")
        shown.print(_routers(result["routers"]))
    if result["routing"] == "batch" or "batch" in result:
        shown.print("routing batch: experts choose among all tokens of the batch, so these numbers use the future.")


def _routers(rows: list[dict[str, Any]]) -> Any:
    """One line for each layer and modality."""
    from rich.table import Table

    columns = ("accuracy", "precision", "recall", "unrouted", "unrouted_batch", "per_token", "per_token_batch")
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "kind", "modality", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name in ("kind", "modality") else "right")
    for row in rows:
        numbers = [f"{row[name]:.3f}" if name in row else "-" for name in columns]
        table.add_row(str(row["layer"]), row["kind"], row["modality"], *numbers)
    return table


def verify_layout(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to compare.")] = 3,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", metavar="N", min=1, show_default=False, help="Ranks; default: tp * pp * ep."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a parallel layout with one process: losses, gradient norms, and the gradient of every tensor.

    The layout and one process each save a checkpoint after step 1, below run.dir, and both are compared tensor by
    tensor; the layout then goes on from the one process's checkpoint. Exit status 1 if they differ.
    """
    from mmscale.config import rules
    from mmscale.config.load import load

    loaded = load(config, overrides or ())
    if nproc is None:
        nproc = loaded.parallel.tp * loaded.parallel.pp * loaded.parallel.ep
    rules.check(loaded, world_size=nproc)
    if ranks.starts_ranks(nproc):
        logs = Path(tempfile.mkdtemp(prefix="mmscale-verify-"))
        status = ranks.start(nproc, log_dir=logs)
        shutil.rmtree(logs)  # on a crash, which raises, they stay and the error names them
        raise typer.Exit(1 if status == _DIFFERS else status)
    env = ranks.own_rank(nproc)
    from mmscale.train import verify

    result = verify.verify_layout(loaded, steps=steps)
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
    """How many choices of tokens are others than those of one process, which the first step repeats."""
    return f"{part['difference']:.2%} of {part['compared']:,} (tolerance {part['tolerance']:.0%})"


def _worst(part: dict[str, Any]) -> str:
    """The tensor that differs most, relative to its norm, and how many exceed the tolerance."""
    number = len(part["differ"])
    found = f"{part['difference']:.2e}, {part['worst']} ({part['compared']} tensors, tolerance {part['tolerance']:.0e})"
    return found if number == 0 else f"{found}; beyond it: {', '.join(part['differ'])}"
