"""`mmscale eval`: held-out losses, tasks and routers of a run's checkpoint or of an export."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmscale.cli import ranks
from mmscale.cli.data_neighbours import given_neighbours
from mmscale.cli.named_files import check_model, check_set, existing, split_step
from mmscale.cli.output import Json, console, emit, pairs
from mmscale.errors import UsageError
from mmscale.runtime.activity import report_activity
from mmscale.tables import plugins
from mmscale.tables.eval_tasks import EVAL_TASKS
from mmscale.tables.plugins import Use
from mmscale.tables.routings import Routing, meanings


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
        int | None,
        typer.Option(
            "--batches", min=1, show_default=False, help="Read the first N global batches of each held-out set."
        ),
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

    An export is computed by transformers, without network access and without running the code in its folder.
    """
    folder, step = split_step(run)
    if routing is not None and routing not in tuple(Routing):
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(Routing)}")
    from mmscale.data.prepared.questions import check_questions

    questions, others = _tasks(task or [])
    near = None if neighbours is None else given_neighbours(neighbours)
    check_set(data)
    if not ranks.is_shared(nproc):
        _check(folder, step, routing, data, near)
        for file in questions.values():
            check_questions(file)
    tasks = [Use("task", "--task", name, {}) for name in others if name not in EVAL_TASKS]
    own_tasks = [name for name in others if name in EVAL_TASKS]
    for use in tasks:
        _check_task(use)
    wanted = {"tasks": tasks, "questions": questions, "own_tasks": own_tasks}
    asked: dict[str, Any] = {key: given for key, given in wanted.items() if given}
    if near is not None:
        asked["neighbours"] = near
    if (folder / "config.json").is_file():
        if routing == "batch":
            raise UsageError(
                "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
            )
        ranks.refuse(nproc, "an export")
        with report_activity("loading torch and transformers", enabled=not as_json) as update:
            from checkpoints_tools.huggingface.evaluate_export import evaluate_export

            shown = f"evaluating {folder}"
            update(shown)
            measured: dict[str, Any] = {"step": step, "data": data, "batches": batches, "routing": routing}
            result = evaluate_export(folder, **measured, **asked, at=functools.partial(update, shown))
    else:
        if ranks.starts_ranks(nproc):
            raise typer.Exit(ranks.start_for_a_while(nproc))
        shared = ranks.shared(nproc)
        shows = not as_json and (shared is None or shared.is_first)
        with report_activity("loading torch and megatron-core", enabled=shows) as update:
            from mmscale.inference.evaluate import evaluate_run

            shown = f"evaluating {folder}"
            update(shown)
            asked["at"] = functools.partial(update, shown)
            chosen = Routing(routing or "batch")
            options: dict[str, Any] = {} if shared is None else {"env": shared}
            options |= asked
            result = evaluate_run(folder, step=step, data=data, batches=batches, routing=chosen, **options)
        result.setdefault("routing", chosen.value)
        if shared is not None and not shared.is_first:
            return
    emit(result, as_json=as_json, text=lambda: _evaluation(result))


def _check(
    folder: Path, step: int | None, routing: str | None, data: Path | None, neighbours: int | Literal["random"] | None
) -> None:
    """Refuse a model that is missing, and a routing and data that a run does not support, before torch is loaded."""
    check_model(folder, step)
    if (folder / "config.json").is_file():
        return
    from mmscale.inference.chosen_data import check_chosen
    from mmscale.inference.supported_routing import check_routing

    if routing is not None:
        check_routing(folder, step, Routing(routing))
    check_chosen(folder, step, data, neighbours)


def _check_task(use: Use) -> None:
    """Refuse what is neither a file nor a built-in task, unless it is a plug-in that can be made."""
    try:
        plugins.check_name(use, ())
    except plugins.MissingPluginError:
        raise UsageError(
            f"there is no task {use.name!r}: --task takes a file of questions (.jsonl), a built-in task "
            f"({', '.join(EVAL_TASKS)}) or a plug-in (module:attribute, or the name of an installed one)",
            remedy="correct the name; tasks of the data set itself are asked without --task",
        ) from None
    plugins.check(use)


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


def _evaluation(result: dict[str, Any]) -> None:
    from rich.table import Table

    from mmscale.runs.display_names import in_words
    from mmscale.runs.recorded_leaks import FIELD
    from mmscale.runs.silent_routers import silent_routers

    table = Table(box=None, pad_edge=False)
    routed = _routed(result)
    for column in ("measured", "value", *(["routing"] if routed else [])):
        table.add_column(column, justify="right" if column == "value" else "left")
    how = [result["routing"]] if routed else []
    tasks = result.get("tasks", {})
    for key, value in result.items():
        if isinstance(value, float):
            found = tasks.get(key.replace("accuracy/", "", 1)) if "accuracy/" in key else None
            table.add_row(_shown(key), f"{value:.4f}" if found is None else _share_right(found), *how)
    for key, value in result.get("batch", {}).items():
        table.add_row(_shown(key), f"{value:.4f}", "batch")
    for key, value in result.get("gap", {}).items():
        table.add_row(f"gap in {key}", f"{value:+.4f}", f"{result['routing']} - batch")
    shown = console()
    apart = ("routing", "sees_later_tokens", "eval_batches")
    plain = {key: value for key, value in result.items() if isinstance(value, str | int) and key not in apart}
    pairs((in_words(key), value) for key, value in plain.items())
    shown.print(table)
    for line in _other_questions(result):
        shown.print(line, markup=False)
    for row in result.get("memorisation", ()):
        shown.print(_memorised(row))
    routers = result.get("routers")
    if routers:
        shown.print("auxiliary routers compared with the choices of batch routing:")
        shown.print(_routers(routers))
    for line in (*silent_routers(routers or ()), *result.get(FIELD, ()), *result.get("notes", ())):
        shown.print(f"note: {line}", markup=False)
    if note := _other_extents(result):
        shown.print(note, markup=False)
    if result.get("sees_later_tokens") or "batch" in result:
        shown.print("routing batch: experts choose among all tokens of the batch, so these numbers use the future.")


def _routed(result: dict[str, Any]) -> bool:
    """Whether the numbers depend on a routing mode: not if nothing in the model chooses among tokens."""
    if result["routing"] == "none":  # an export
        return False
    return result.get("sees_later_tokens", True) or "batch" in result  # a run


def _other_questions(result: dict[str, Any]) -> Iterator[str]:
    """Questions that were not asked: of a data set whose task has the same name, and files that training asks."""
    for name, task in result.get("tasks", {}).items():
        if task["not_asked"]:
            yield f"{name}: questions of {task['from']}; not those of {', '.join(task['not_asked'])}"
    for text in result.get("not_asked", ()):
        yield f"training asks {text} too: --task {shlex.quote(text)}"


def _other_extents(result: dict[str, Any]) -> str:
    """How to get the numbers of training if it reads other parts of the sets; empty if it reads the same."""
    from mmscale.wording import numbered

    found = [
        f"{name}: {numbered(read, 'batch', 'batches')} read here, the first {trained:,} in training"
        for name, one in result.get("extents", {}).items()
        if (read := one["batches"]) != (trained := one["batches_in_training"])
    ]
    setting = result.get("eval_batches")
    return f"{'; '.join(found)} (train.eval_batches): --batches {setting} gives its numbers" if found else ""


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
