"""Commands that train and evaluate.

`mmscale train`, `eval` and `verify-layout`: the commands that compute. They find the rank, call train/ or inference/,
and print the result.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.data_neighbours import given_neighbours
from mmscale.cli.named_files import check_model, check_set, existing
from mmscale.cli.output import Json, Overrides, console, emit, pairs
from mmscale.cli.stage import FromScratch, OfStage, StageName
from mmscale.errors import TrainingError, UsageError
from mmscale.runtime.rank_env import RankEnv
from mmscale.runtime.waiting import Waiting, waiting
from mmscale.tables import plugins
from mmscale.tables.eval_tasks import EVAL_TASKS
from mmscale.tables.plugins import Use
from mmscale.tables.routings import Routing, meanings

if TYPE_CHECKING:
    from mmscale.train.stages.table import Stage as StageEntry

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
BEST = "best"  # after an @, instead of a step
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
    from mmscale.runs.metrics import read_metrics
    from mmscale.runtime import console
    from mmscale.train import holding
    from mmscale.train.stages.table import STAGES

    console.guard()
    loaded = load(config, overrides or ())
    entry = STAGES[stage]
    main_run = Path(loaded.run.dir) / loaded.run.name
    folder = entry.folder(main_run)
    starts = ranks.starts_ranks(nproc)
    env = RankEnv() if starts else ranks.own_rank(nproc)
    if env.world_size == 1:  # in a process group the first rank refuses on behalf of all
        holding.refuse_held(main_run, entry)
    if from_scratch:
        from mmscale.train.scratch import start_from_scratch

        start_from_scratch(folder, first=env.is_first)
    if starts:
        assert nproc is not None
        entry.preflight(loaded, world_size=nproc, yes=yes)  # printed once here instead of by every rank
        raise typer.Exit(_start_ranks(nproc, main_run, entry))
    if env.world_size == 1:
        entry.preflight(loaded, world_size=1, yes=yes)  # a wrong path is named before torch has been loaded
    with Waiting("loading torch and megatron-core", enabled=env.is_first) as starting:
        from mmscale.train import run

        status = run.main(loaded, env, stage=entry.name, yes=yes, grace_s=grace, starting=starting)
    if env.is_first and as_json:
        records = read_metrics(folder)
        result = {"run": str(folder), "exit_status": status, "last": records[-1] if records else None}
        emit(result, as_json=True, text=lambda: None)
    raise typer.Exit(status)


def _start_ranks(nproc: int, run: Path, stage: StageEntry) -> int:
    """Train with local ranks; returns their exit status. Holds the run's lease unless a launch's job holds it."""
    from mmscale.resilience.lease import VARIABLE, launched_attempt
    from mmscale.runs.attempts import next_attempt
    from mmscale.train import holding

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
            help=f"How experts are selected. {meanings(Routing)}",
        ),
    ] = None,
    batches: Annotated[
        int | None, typer.Option("--batches", min=1, show_default=False, help="Stop after N batches.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="[NAME=]FILE|NAME|PLUGIN",
            show_default=False,
            help="JSONL of questions with choices or with one right answer; a built-in task "
            f"({EVAL_TASKS.help.rstrip('.')}); or a plug-in that measures something else, as module:attribute or by "
            "its entry point. May be repeated.",
        ),
    ] = None,
    neighbours: Annotated[
        str | None,
        typer.Option(
            "--neighbours",
            metavar="N|random",
            show_default="data.retrieval.evaluation of the run",
            help="Number of nearest training documents that each held-out document is read with, or random: as many "
            "random ones as the run trains with. Their tokens are not part of the losses.",
        ),
    ] = None,
    nproc: ranks.OnRanks = None,
    as_json: Json = False,
) -> None:
    """Print loss and perplexity of each modality on held-out data, and accuracy if the data has a task.

    transformers computes an export, without network access and without the code in its folder.
    """
    folder, step = split_step(run)
    if routing is not None and routing not in tuple(Routing):
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(Routing)}")
    questions, others = _tasks(task or [])
    check_model(folder, step)
    check_set(data)
    tasks = [Use("task", "--task", name, {}) for name in others if name not in EVAL_TASKS]
    own_tasks = [name for name in others if name in EVAL_TASKS]
    for use in tasks:
        plugins.check(use)
    wanted = {"tasks": tasks, "questions": questions, "own_tasks": own_tasks}
    asked: dict[str, Any] = {key: given for key, given in wanted.items() if given}
    if neighbours is not None:
        asked["neighbours"] = given_neighbours(neighbours)
    if (folder / "config.json").is_file():
        if routing == "batch":
            raise UsageError(
                "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
            )
        ranks.refuse(nproc, "an export")
        with waiting("loading torch and transformers", enabled=not as_json) as tell:
            from checkpoints_tools.huggingface.evaluate_export import evaluate_export

            shown = f"evaluating {folder}"
            tell(shown)
            measured: dict[str, Any] = {"step": step, "data": data, "batches": batches, "routing": routing}
            result = evaluate_export(folder, **measured, **asked, at=functools.partial(tell, shown))
    else:
        if ranks.starts_ranks(nproc):
            raise typer.Exit(ranks.start_for_a_while(nproc))
        shared = ranks.shared(nproc)
        shows = not as_json and (shared is None or shared.is_first)
        with waiting("loading torch and megatron-core", enabled=shows) as tell:
            from mmscale.inference.evaluate import evaluate_run

            shown = f"evaluating {folder}"
            tell(shown)
            asked["at"] = functools.partial(tell, shown)
            chosen = Routing(routing or "batch")
            options: dict[str, Any] = {} if shared is None else {"env": shared}
            options |= asked
            result = evaluate_run(folder, step=step, data=data, batches=batches, routing=chosen, **options)
        result.setdefault("routing", chosen.value)
        if shared is not None and not shared.is_first:
            return
    emit(result, as_json=as_json, text=lambda: _evaluation(result))


def _tasks(named: list[str]) -> tuple[dict[str, Path], list[str]]:
    """Files of questions by name (`icons=which.jsonl`, or the file's own name), and all other arguments: plug-ins.

    Raises:
        UsageError: two files have the same name.
    """
    from mmscale.data.prepared.named_tasks import question_file

    found: dict[str, Path] = {}
    others = []
    for text in named:
        name, path = question_file(text)
        if path is None:
            others.append(text)
            continue
        if name in found:
            raise UsageError(f"--task: two tasks are named {name}", remedy="give them names: --task NAME=FILE")
        found[name] = existing(path, whose="task: ")
    return found, others


def split_step(text: str) -> tuple[Path, int | None]:
    """`runs/x@100` -> (runs/x, 100); `runs/x@best` -> (runs/x, step of the best checkpoint).

    Raises:
        UsageError: the text after the @ is not a step.
    """
    folder, at, step = text.rpartition("@")
    if not at:
        return Path(text), None
    if step.isdigit():
        return Path(folder), int(step)
    if step == BEST and not Path(text).exists():
        return Path(folder), _best_of(Path(folder))
    if "/" in step or Path(text).exists():  # the @ is part of the path
        return Path(text), None
    raise UsageError(f"{text}: {step!r} after the @ is not a step", remedy=f"write a number, e.g. {folder}@100")


def _best_of(run: Path) -> int:
    from mmscale.checkpoint.layout import Store

    best = Store.of_run(run).best()
    if best is None:
        raise UsageError(
            f"{run}@{BEST}: no checkpoint of this run is known to be the best one",
            remedy="train with checkpoint.keep_best=eval/loss, or name a step",
        )
    return best


def _evaluation(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("measured", "value", "routing"):
        table.add_column(column, justify="right" if column == "value" else "left")
    tasks = result.get("tasks", {})
    for key, value in result.items():
        if isinstance(value, float):
            found = tasks.get(key.replace("accuracy/", "", 1)) if "accuracy/" in key else None
            table.add_row(_shown(key), f"{value:.4f}" if found is None else _share_right(found), result["routing"])
    for key, value in result.get("batch", {}).items():
        table.add_row(_shown(key), f"{value:.4f}", "batch")
    for key, value in result.get("gap", {}).items():
        table.add_row(f"gap in {key}", f"{value:+.4f}", f"{result['routing']} - batch")
    shown = console()
    apart = ("routing", "sees_later_tokens")
    plain = {key: value for key, value in result.items() if isinstance(value, str | int) and key not in apart}
    pairs(plain.items())
    shown.print(table)
    for name, task in tasks.items():
        if task["not_asked"]:
            shown.print(f"{name}: questions of {task['from']}; not those of {', '.join(task['not_asked'])}")
    for row in result.get("memorisation", ()):
        shown.print(_memorised(row))
    if result.get("routers"):
        shown.print("auxiliary routers compared with the choices of batch routing:")
        shown.print(_routers(result["routers"]))
    read, training = result.get("batches"), result.get("batches_in_training")
    if read != training:
        shown.print(
            f"{read} batches were read; evaluations in training read the first {training} (train.eval_batches): "
            f"--batches {training} gives their numbers"
        )
    if result.get("sees_later_tokens") or "batch" in result:
        shown.print("routing batch: experts choose among all tokens of the batch, so these numbers use the future.")


def _shown(key: str) -> str:
    """The name of a value, with an explanation if it needs one (Z: the softmax's denominator)."""
    return key.replace("z_loss", "z_loss = mean of (log Z)²")


def _share_right(found: dict[str, Any]) -> str:
    """`22.9%, 11 of 48 (95 % interval 13.3% to 36.5%, chance 10.0%)`."""
    chance = "" if found["chance"] is None else f", chance {found['chance']:.1%}"
    interval = f"95 % interval {found['low']:.1%} to {found['high']:.1%}"
    return f"{found['right'] / found['asked']:.1%}, {found['right']} of {found['asked']} ({interval}{chance})"


def _memorised(row: dict[str, Any]) -> str:
    """`canaries/16: 91.2% of 384 contexts memorised (8 documents, read 48.0 times; 95 % interval 88.1% to 94.3%)`."""
    reads = "" if row["reads"] is None else f", read {row['reads']:.1f} times"
    return (
        f"{row['name']}: {row['memorised']:.1%} of {row['contexts']:,} contexts memorised ({row['documents']} documents"
        f"{reads}; 95 % interval {row['low']:.1%} to {row['high']:.1%})"
    )


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
