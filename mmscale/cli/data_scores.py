"""Commands that score the documents of a prepared data set.

`mmscale data score` and `fit-classifier`: calls data/scoring, and inference/score_documents.py for scores by a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.data_weights import DataSet
from mmscale.cli.named_files import split_step
from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import UsageError
from mmscale.runtime.activity import report_activity
from mmscale.tables.routings import Routing
from mmscale.tables.run_scores import RUN_SCORES


def score(
    folder: DataSet,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="WHAT",
            help="rules: text quality by rules about lines; classifier:FILE: a classifier of `data fit-classifier`; "
            "perplexity:RUN, memorised:RUN or influence:RUN (RUN@STEP for a step): a run's checkpoint; FILE.npy or "
            "FILE.parquet (column score): a score for each training document, in the order of the data set. Scores "
            f"by a run: {RUN_SCORES.help}",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            show_default=False,
            help="Name of the score. Default: the first word of --by, or the name of the file.",
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            show_default=False,
            help="How experts are assigned to tokens, for scores by a run. Default: causal, which needs auxiliary "
            "routers. With batch, a score also depends on later tokens and on the neighbours in a sequence.",
        ),
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option(
            "--heads",
            min=0.0,
            max=1.0,
            show_default=False,
            help="Share of the attention heads that influence masks. Default: 0.05.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            show_default=False,
            help="Processes. Default: 2; for scores by a run 1, because each has a model of its own. They share "
            "the GPUs of the machine.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a score of each training document beside the data, for `mmscale data select`.

    Scores by a run are written for each modality too, as NAME_MODALITY. They are computed in this process; started
    again after an interruption, the command continues.
    """
    from mmscale.data.progress import Reporter
    from mmscale.data.scoring.score import score as score_without_run

    kind, _, argument = by.partition(":")
    if kind in RUN_SCORES and argument:
        result = _score_by_run(
            folder, kind, argument, name, routing=routing, heads=heads, workers=workers or 1, as_json=as_json
        )
    elif routing is not None or heads is not None:
        raise UsageError(
            f"data score: --by {by} has no {'--routing' if routing is not None else '--heads'}",
            remedy=f"leave it out, or score by a run: {', '.join(f'{one}:RUN' for one in RUN_SCORES)}",
        )
    else:
        result = score_without_run(folder, by, name=name, workers=workers or 2, reporter=Reporter(enabled=not as_json))
    emit(result, as_json=as_json, text=lambda: _scored(result))


def _score_by_run(
    folder: Path,
    kind: str,
    run: str,
    name: str | None,
    *,
    routing: str | None,
    heads: float | None,
    workers: int,
    as_json: bool,
) -> dict[str, Any]:
    from mmscale.data.progress import Reporter
    from mmscale.inference.chosen_data import check_scored

    if heads is not None and not RUN_SCORES[kind].masks:
        raise UsageError(f"data score: --by {kind} masks no heads", remedy="leave --heads out, or use influence:RUN")
    if routing is not None and routing not in tuple(Routing):
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(Routing)}")
    path, step = split_step(run)
    chosen = Routing(routing or Routing.CAUSAL)
    check_scored(folder, path, step, chosen, name or kind)
    with report_activity("loading torch and megatron-core", enabled=not as_json):
        from mmscale.inference.score_documents import HEADS, score_by_run
    return score_by_run(
        folder,
        kind,
        path,
        step=step,
        routing=chosen,
        heads=HEADS if heads is None else heads,
        name=name,
        workers=workers,
        reporter=Reporter(enabled=not as_json),
    )


def _scored(result: dict[str, Any]) -> None:
    quantiles = " / ".join(f"{value:.4g}" for value in result["quantiles"])
    rows: list[tuple[str, object]] = [
        ("data set", result["folder"]),
        ("score", ", ".join(result["names"])),
        ("least / quartiles / most", quantiles or "no document has a score"),
    ]
    if result["scored"] < result["documents"]:
        rows.append(("", f"{result['documents'] - result['scored']:,} documents have no trained label and no score"))
    if "run" in result:
        rows.append(("model", f"step {result['step']} of {result['run']}, {result['routing']} routing"))
        if result["trained_on"]:
            rows.append(("", "the run trains on this data set: it may know these documents by heart"))
    if "heads" in result:
        masked = ", ".join(f"{layer}.{head}" for layer, head in result["heads"])
        rows.append(("masked heads", f"{masked} (layer.head, from 0)"))
    pairs(rows)


def fit_classifier(
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File of the classifier.")],
    good: Annotated[
        list[Path],
        typer.Option("--good", metavar="DIR", help="Prepared data set of documents to prefer; may be repeated."),
    ],
    bad: Annotated[
        list[Path],
        typer.Option("--bad", metavar="DIR", help="Prepared data set of other documents; may be repeated."),
    ],
    good_if: Annotated[
        str | None,
        typer.Option(
            "--good-if",
            metavar="EXPRESSION",
            show_default=False,
            help="Only documents of --good for which this holds, from scores and tokens as in `data select --expr`.",
        ),
    ] = None,
    bad_if: Annotated[
        str | None,
        typer.Option(
            "--bad-if", metavar="EXPRESSION", show_default=False, help="Likewise for --bad, e.g. 'preselect < 0.1'."
        ),
    ] = None,
    most: Annotated[
        int,
        typer.Option(
            "--documents", min=1, help="Largest number of documents of a class; of more a random sample is read."
        ),
    ] = 100_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a linear classifier of texts for `mmscale data score --by classifier:FILE`."""
    from mmscale.data.progress import Reporter
    from mmscale.data.scoring import classifier

    made, result = classifier.fit_classifier(
        [classifier.ClassExamples(folder, good_if) for folder in good],
        [classifier.ClassExamples(folder, bad_if) for folder in bad],
        most=most,
        seed=seed,
        reporter=Reporter(enabled=not as_json),
    )
    classifier.write_classifier(out, made)
    result = {"file": str(out)} | result
    rows = [
        ("classifier", str(out)),
        ("trained on", f"{result['good']:,} good and {result['bad']:,} bad documents"),
        ("held out", f"{result['held_out']:,} of them: {result['accuracy']:.1%} right"),
        ("area under ROC", f"{result['area_under_roc']:.4f}"),
    ]
    emit(result, as_json=as_json, text=lambda: pairs(rows))
