"""Commands that decide which documents of a prepared data set are trained on, and how often.

`mmscale data dedup` and `select`: calls data/dedup and data/scoring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import Tasks
from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import DataError, LaunchError, UsageError, shell_command
from mmscale.tables.minhash import MINHASHES

MATCHES = ("joint", "text", "image")
DataSet = Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data set.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes.")]


def dedup(
    folder: DataSet,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="DIR",
            help="Prepared data set whose held-out documents (or all, if none are held out) training must not contain; "
            "may be repeated.",
        ),
    ] = None,
    own: Annotated[
        bool, typer.Option("--held-out/--no-held-out", help="Compare with the data set's own held-out documents too.")
    ] = True,
    match: Annotated[
        str,
        typer.Option(
            "--match",
            metavar="WHAT",
            help="What makes documents duplicates. joint: texts and items; text: texts, whatever the items; image: "
            "items, whatever the texts.",
        ),
    ] = "joint",
    similarity: Annotated[
        float,
        typer.Option(
            "--similarity",
            min=0.0,
            max=1.0,
            help="Texts are duplicates from this estimated Jaccard index of word 5-grams.",
        ),
    ] = 0.7,
    distance: Annotated[
        int,
        typer.Option(
            "--image-distance",
            min=-1,
            max=6,
            help="Largest number of different bits, of 64, between the perceptual hashes of equal pictures; -1: "
            "compare only codes, and decode no pictures.",
        ),
    ] = 2,
    exact: Annotated[bool, typer.Option("--exact", help="Only equal texts and equal codes are duplicates.")] = False,
    minhash: Annotated[
        str,
        typer.Option(
            "--minhash",
            help=f"The program that computes signatures of texts. {MINHASHES.help}",
        ),
    ] = "numpy",
    max_cluster: Annotated[
        int | None,
        typer.Option(
            "--max-cluster",
            min=1,
            show_default=False,
            help="Largest number of different contents that may be linked as duplicates; more are an error. Default: a "
            "hundredth of the documents, at least 1000.",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch",
            metavar="DIR",
            show_default=False,
            help="Folder for temporary files, 1,000 bytes per document. Default: .cache inside the data set.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Processes, of each task. Default: 2; with local tasks 1.", show_default=False
        ),
    ] = None,
    tasks: Tasks = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="NAME", show_default=False, help="Profile of a SLURM cluster whose jobs do the work."
        ),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the weights, so that training reads all documents again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Leave duplicates, and documents that contain held-out ones, out of training.

    Tokens are not changed. The weights are written to selection/ in the data set's folder, which every run reads at its
    start (see data.selection).
    """
    from mmscale.data.dedup import apply, shared, signers
    from mmscale.data.dedup.pairs import DuplicateRule
    from mmscale.data.process_pool import run_stages
    from mmscale.data.progress import Reporter

    if match not in MATCHES:
        raise UsageError(f"data dedup: --match {match!r} is none of {', '.join(MATCHES)}", remedy="choose one of these")
    if remove:
        done = apply.undo(folder)
        _removed(folder, done, "is trained on whole" if done else "left out nothing", as_json=as_json)
        return
    if minhash not in MINHASHES:
        raise UsageError(
            f"data dedup: --minhash {minhash!r} is none of {', '.join(MINHASHES)}", remedy="choose one of these"
        )
    rule = DuplicateRule(match, similarity, distance, exact, signers.exact_name(minhash))
    request: dict[str, Any] = {"rule": rule, "against": against or [], "held_out": own, "max_cluster": max_cluster}
    request["scratch"] = scratch
    if cluster is not None and tasks is None:
        raise UsageError("data dedup: --cluster needs --tasks", remedy="say how many: --tasks N")
    if tasks is not None:
        planned = shared.plan_tasks(folder, tasks=tasks, **request)
        if cluster is not None:
            submitted = _submit(folder.resolve(), planned, cluster, workers=workers or 2)
            emit(submitted, as_json=as_json, text=lambda: pairs(submitted.items()))
            return
        (result,) = run_stages(planned.stages(workers=workers or 1, progress=not as_json), tasks=tasks)
    else:
        result = apply.dedup(folder, workers=workers or 2, reporter=Reporter(enabled=not as_json), **request)
    emit(result, as_json=as_json, text=lambda: _found(result))


def _submit(folder: Path, planned: Any, cluster: str, *, workers: int) -> dict[str, Any]:
    """Submit the tasks of a planned deduplication."""
    from launch import job_arrays
    from launch.profile import load_profile

    profile = load_profile(cluster, {})
    job_arrays.check(profile)
    if going := job_arrays.unfinished(planned.jobs()):
        cancel = f"scancel {' '.join(going)}"
        raise DataError(
            f"data: jobs are deduplicating {folder}: {', '.join(going)} wait or run",
            remedy=f"wait for them ({shell_command('status', folder)}), or cancel them first: {cancel}",
        )
    stages = planned.stages(workers=workers, progress=True)
    planned.keep_jobs()
    try:
        jobs = job_arrays.submit(stages, folder=planned.logs, name=f"mmscale-dedup-{folder.name}", profile=profile)
    except LaunchError as error:
        planned.keep_jobs(refused=error.cause)
        raise
    planned.keep_jobs(jobs)
    return {
        "folder": str(folder),
        "state": "submitted",
        "tasks": len(planned.work.blocks),
        "jobs": ", ".join(jobs),
        "logs": str(planned.logs),
    }


def _removed(folder: Path, done: bool, words: str, *, as_json: bool) -> None:
    emit({"folder": str(folder), "removed": done}, as_json=as_json, text=lambda: pairs([("data set", words)]))


def _found(result: dict[str, Any]) -> None:
    rows: list[tuple[str, object]] = [
        ("data set", result["folder"]),
        ("kept", f"{result['kept']:,} of {result['documents']:,} documents"),
        ("duplicates", f"{result['duplicates']:,}, in {result['clusters']:,} clusters"),
    ]
    for what, count in result["contaminated"].items():
        if count:
            rows.append(("contaminated", f"{count:,} documents have {what} of held-out documents"))
    rows += [
        ("cluster", f"{one['documents']:,} documents like document {one['first']}: {one['text']!r}")
        for one in result["largest"][:3]
    ]
    pairs(rows)


def select(
    folder: DataSet,
    expression: Annotated[
        str | None,
        typer.Option(
            "--expr",
            metavar="EXPRESSION",
            show_default=False,
            help="A condition, or how often an epoch reads a document, from scores, `tokens` and tokens of modalities, "
            "e.g. 'rules > 0.4 and image_tokens > 0' or '1 + (quality > 0.9)'.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="SCORE",
            show_default=False,
            help="Score (or expression) by which --top keeps the best documents.",
        ),
    ] = None,
    top: Annotated[
        float | None,
        typer.Option("--top", min=0.0, max=1.0, show_default=False, help="Share of the documents to keep."),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Above 0: sample with probabilities softmax(score / temperature)."),
    ] = 0.0,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--d4",
            metavar="EMBEDDINGS.npy",
            show_default=False,
            help="Embeddings, a row for each training document: removes near duplicates and the most typical "
            "documents.",
        ),
    ] = None,
    clusters: Annotated[int, typer.Option("--clusters", min=1, help="Number of clusters for D4.")] = 1000,
    similar: Annotated[
        float, typer.Option("--similar", min=-1.0, max=1.0, help="Cosine similarity of near duplicates in D4.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of sampling and clustering.")] = 0,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the weights that this command wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Write how often an epoch reads each training document; weights of `mmscale data dedup` stay in force."""
    from mmscale.data.scoring import weigh

    if remove:
        done = weigh.undo(folder)
        _removed(folder, done, "has no selection any more" if done else "had no selection", as_json=as_json)
        return
    result = weigh.select(
        folder,
        expression=expression,
        by=by,
        top=top,
        temperature=temperature,
        embeddings=embeddings,
        clusters=clusters,
        similar=similar,
        seed=seed,
    )
    shown = f"{result['kept']:,} of {result['documents']:,} documents, {result['weight']:,.1f} in an epoch"
    emit(result, as_json=as_json, text=lambda: pairs([("data set", str(folder)), ("kept", shown)]))
