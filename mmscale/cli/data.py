"""Commands that prepare, inspect and verify data sets.

`mmscale data prepare`, `inspect` and `verify`: calls prepare.py and inspect_set.py of data/prepared, and
data/digests.py. Documents and data sets are defined there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import Overrides, Tasks
from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import DataError, LaunchError, UsageError, shell_command
from mmscale.wording import numbered

app = typer.Typer(help="Prepare, inspect, verify and filter data sets.", no_args_is_help=True)

# Preparing reads `vocab` and `data.prepare` only, but a configuration has a model; this one is never built.
_NO_MODEL = {
    "kind": "dense",
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 1,
}


@app.command("prepare", epilog="Example: mmscale data prepare --documents 'corpus/part-*.jsonl' --out data/corpus")
def prepare(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the data set.")],
    spec: Annotated[
        str,
        typer.Argument(metavar="SPEC.yaml", show_default=False, help="Configuration with a data.prepare section."),
    ] = "",
    overrides: Overrides = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents",
            metavar="FILE",
            help="Document files (JSONL, parquet, .tar), a folder or a glob; may be repeated. Default: "
            "data.prepare.documents.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="DIR",
            show_default=False,
            help="Reuse the vocabulary and the tokenizers of a prepared data set, to mix both in data.blend.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing data set that was made from other documents or settings."
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad document.")] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Worker processes; default: data.prepare.workers.", show_default=False),
    ] = None,
    tasks: Tasks = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="NAME",
            show_default=False,
            help="Profile of a SLURM cluster whose jobs prepare the parts; this process lists documents and makes "
            "tokenizers.",
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus",
            metavar="N",
            min=0,
            help="GPUs of this machine, or of each task of --cluster, that compute an image tokenizer of kind vq.",
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Tokenize documents of text, images and other modalities into a data set, in parallel. Run it again to resume."""
    changes = list(overrides or [])
    if "=" in spec:  # without SPEC its place holds the first setting
        changes.insert(0, spec)
        spec = ""
    config = _spec(spec, changes, documents or [], like)
    from mmscale.data.prepared import inspect_set
    from mmscale.data.prepared import prepare as preparing
    from mmscale.data.prepared.gpu_check import check_gpus
    from mmscale.data.process_pool import run_stages

    given: dict[str, Any] = {"strict": strict or None, "workers": workers, "gpus": gpus, "progress": not as_json}
    if cluster is not None and tasks is None:
        raise UsageError(
            "data prepare: --cluster needs --tasks", remedy="say how many tasks share the parts: --tasks N"
        )
    if tasks is not None and cluster is not None:
        submitted = _submit(config, out.resolve(), cluster, number=tasks, overwrite=overwrite, given=given)
        emit(submitted, as_json=as_json, text=lambda: pairs(submitted.items()))
        return
    if tasks is not None:
        check_gpus(config, gpus, here=True)
        given["workers"] = workers or 1
        run_stages([preparing.plan_shares(config, out, number=tasks, overwrite=overwrite, **given)], tasks=tasks)
        overwrite = False
    preparing.prepare(config, out, overwrite=overwrite, **given)
    result = inspect_set.summary(out)
    emit(result, as_json=as_json, text=lambda: _summary(result, remarks=False))


def _submit(
    config: Any, out: Path, cluster: str, *, number: int, overwrite: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """Submit shares of the parts, and the job that finishes."""
    from launch import job_arrays
    from launch.profile import load_profile
    from mmscale.data.prepared import folder, shares
    from mmscale.data.prepared import prepare as preparing

    profile = load_profile(cluster, {})
    job_arrays.check(profile, gpus=given["gpus"])
    before = shares.read_plan(out)
    if before is not None and (going := job_arrays.unfinished(before.jobs)):
        raise DataError(
            f"data: jobs are making {out}: {', '.join(going)} wait or run",
            remedy=f"wait for them ({shell_command('status', out)}), or cancel them first: scancel {' '.join(going)}",
        )
    found = preparing.plan_shares(config, out, number=number, overwrite=overwrite, **given)
    kept = {key: given[key] for key in ("strict", "workers")}
    if not found:
        preparing.finish(config, out, **kept)
        return {"folder": str(out), "state": "prepared"}
    name = f"mmscale-prepare-{out.name}"
    planned = shares.read_plan(out)
    assert planned is not None, "plan_shares has written it"
    gpus = given["gpus"]
    # The last job reads the data set for minutes to hours, without a GPU; so another one makes what tasks have left.
    finish = functools.partial(preparing.finish, config, out, **kept, whole=gpus > 0)
    stages: list[Sequence[Callable[[], Any]]] = [found, *([[shares.rest_of(found)]] if gpus else []), [finish]]
    try:
        jobs = job_arrays.submit(
            stages, folder=out / folder.JOBS, name=name, profile=profile, gpus=[*(gpus for _ in stages[1:]), 0]
        )
    except LaunchError as error:
        shares.SharedPlan(planned.parts, refused=error.cause).write(out)
        raise
    shares.SharedPlan(planned.parts, tuple(jobs)).write(out)
    parts = sum(len(one.jobs) for one in found)
    return {"folder": str(out), "state": "submitted", "parts": parts, "tasks": len(found), "jobs": ", ".join(jobs)}


def _spec(spec: str, overrides: list[str], documents: list[str], like: Path | None) -> Any:
    if like is None:
        return _loaded(spec, overrides, documents)
    from mmscale.config import load as loading
    from mmscale.data.prepared import reuse

    given = None
    if spec:
        alone = loading.load(spec, overrides)
        reuse.check_vocabulary_like(like, alone)
        reuse.check_fit_like(like, alone)
        given = alone.data.prepare
    config = _loaded(spec, [*reuse.settings_like(like, given), *overrides], documents)
    reuse.check_fit_like(like, config)
    return config


def _loaded(spec: str, overrides: list[str], documents: list[str]) -> Any:
    from mmscale.config import load as loading

    if documents:
        names = json.dumps(documents, ensure_ascii=False)
        overrides = [*overrides, "data.prepare.source=documents", f"data.prepare.documents={names}"]
    if spec:
        return loading.load(spec, overrides)
    if not documents and not any(change.startswith("data.prepare.source=") for change in overrides):
        raise UsageError(
            "data prepare: neither a SPEC.yaml nor --documents is given",
            remedy="name a configuration, e.g. configs/quickstart.yaml, or the documents: --documents FILE.jsonl",
        )
    return loading.resolve({"model": _NO_MODEL}, overrides)


@app.command("inspect", epilog="Example: mmscale data inspect data/digits --sample 3 --out sample")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data set, or the folder of a run.")],
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=0, help="Decode document N to text and PNG files.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the sample.")] = "train",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the sample's PNG files.")] = Path(
        "sample"
    ),
    held_out: Annotated[
        bool, typer.Option("--held-out", help="List the held-out documents, one per line; with --sample, decode one.")
    ] = False,
    trained_on: Annotated[
        Path | None,
        typer.Option(
            "--trained-on",
            metavar="DIR",
            show_default=False,
            help="With --held-out: mark documents that this data set trains on, instead of those of the same set.",
        ),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option(
            "--neighbours", metavar="K", min=0, help="With --sample: decode its K nearest training documents before it."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Print documents and tokens of each modality, or write one document as text and PNG.

    Of a run: tokens and passes over each of its data sets, done and planned.
    """
    from mmscale.runs.events import EVENTS

    if sample is None and split != "train":
        raise UsageError(f"--split {split} is the split of --sample, which is not given", remedy="add --sample N")
    if trained_on is not None and (sample is not None or not held_out):
        raise UsageError("--trained-on says which held-out documents --held-out marks", remedy="add --held-out")
    if (folder / EVENTS).is_file() and sample is None and not held_out:
        sources = _sources_of(folder)
        emit(sources, as_json=as_json, text=lambda: _print_sources(sources))
        return
    from mmscale.data.prepared import inspect_set

    if held_out and sample is None:
        documents = enumerate(inspect_set.lines(folder, "validation", trained_on=trained_on))
        if as_json:
            emit([{"index": index, "text": line} for index, line in documents], as_json=True, text=lambda: None)
            return
        for index, line in documents:
            typer.echo(f"{index}\t{line}")
        return
    if sample is None:
        result = inspect_set.summary(folder)
        emit(result, as_json=as_json, text=lambda: _summary(result))
        return
    drawn = inspect_set.draw_sample(
        folder, sample, out, split="validation" if held_out else split, neighbours=neighbours
    )
    rows = [("text", drawn["text"]), ("tokens", _counts(drawn["tokens"])), ("drawn on", drawn["sheet"])]
    rows += [(f"{name} files", ", ".join(own)) for name, own in drawn["files"].items() if name != "image"]
    emit(drawn, as_json=as_json, text=lambda: pairs(rows))


@app.command("verify", epilog="Example: mmscale data verify data/digits")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data set.")], as_json: Json = False
) -> None:
    """Read and hash every file of a data set.

    Exit status 3 if a file has changed since its preparation. Data sets of older versions have no digests; then only
    sizes are compared.
    """
    from mmscale.data import digests
    from mmscale.data.prepared import neighbours, selection
    from mmscale.data.prepared.manifest import read_manifest

    read_manifest(folder, setting="the path")
    wanted = digests.read(folder)
    if wanted is not None:
        wanted |= selection.digests_of(folder) | neighbours.digests_of(folder)
    damaged = dict(digests.verify(folder, wanted or {}))
    result = {"folder": str(folder), "digests": wanted is not None, "files": len(wanted or {}), "damaged": damaged}
    emit(result, as_json=as_json, text=lambda: _verdict(result))
    if damaged:
        name, what = next(iter(damaged.items()))
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise DataError(
            f"data: {folder / name} {what}{more}",
            remedy="copy the data set again; or delete that part's files and run `mmscale data prepare` again",
        )


def _sources_of(run: Path) -> dict[str, Any]:
    """Passes over the data sets of a run, ready for JSON."""
    from mmscale.runs.events import read_events
    from mmscale.runs.last_step import last_step
    from mmscale.runs.recorded_leaks import leaks_in
    from mmscale.runs.run_progress import RunProgress
    from mmscale.runs.sources_read import sources_read

    progress = RunProgress.load(run)
    progress.update(run)
    events, logged = read_events(run), progress.last
    step = last_step(events, logged=int(logged.get("step", 0)), attempt=int(logged.get("attempt", 0)))
    found = sources_read(events, step=step)
    if not found:
        raise UsageError(
            f"data inspect: {run} has no start event with its data sets",
            remedy="name a run that this version has started or resumed, or a prepared data set",
        )
    return {
        "run": str(run),
        "step": step,
        "leaks": leaks_in(events),
        "sources": [asdict(one) | {"tokens_done": one.tokens_done} for one in found],
    }


def _print_sources(result: dict[str, Any]) -> None:
    from mmscale.train.log.progress_lines import count

    rows: list[tuple[str, object]] = [("run", f"{result['run']}, step {result['step']:,}")]
    for one in result["sources"]:
        limit = f", at most {one['max_epochs']}" if one["max_epochs"] else ""
        rows.append((one["path"], f"{one['done']:.2f} of {one['planned']:.2f} planned passes{limit}"))
        rows.append(("", f"{_counts(one['tokens'])} tokens in a pass, about {count(one['tokens_done'])} read"))
    rows += [("held out", line) for line in result["leaks"]]
    pairs(rows)


def _verdict(result: dict[str, Any]) -> None:
    words = f"{result['files'] - len(result['damaged'])} of {result['files']} files are unchanged"
    if not result["digests"]:
        words = "no digests: an older version prepared the data set; all files exist and have the right sizes"
    pairs([("data set", result["folder"]), ("verified", words), *result["damaged"].items()])


def _summary(result: dict[str, Any], *, remarks: bool = True) -> None:
    """Print the facts of a data set; without `remarks` those that `data prepare` has said already are left out."""
    rows: list[tuple[str, object]] = [("data set", result["folder"])]
    for name, split in result["splits"].items():
        lengths = split.get("document_tokens")
        mean = f"; {lengths['mean']:g} a document ({lengths['shortest']}..{lengths['longest']})" if lengths else ""
        rows.append((name, f"{split['documents']:,} documents, {_counts(split['tokens'])} tokens{mean}"))
    if chosen := result["selection"]:
        rows.append(("", f"{chosen['kept']:,} of them in training, {_counts(chosen['tokens'])} tokens per epoch"))
        rows.append(("", f"by the weights {', '.join(chosen['layers'])}"))
        if not chosen["current"]:
            rows.append(("", "which were made for other documents: run the commands that made them again"))
    ranges = result["vocabulary"]["ranges"]
    rows.append(("ids", ", ".join(f"{name} {first}..{end - 1}" for name, (first, end) in ranges.items())))
    for name in ranges:
        own = result.get(f"{name}_tokenizer")
        if own and (each := own.get(f"tokens_per_{name}")):
            size = f"{own['size']}x{own['size']} pixels, " if "size" in own else ""
            rate = f"{own['rate']} Hz, " if "rate" in own else ""
            quality = f", PSNR {own['psnr_db']:.1f} dB" if isinstance(own.get("psnr_db"), float) else ""
            what = f"{own['kind']}, {size}{rate}{each} tokens each, {own['codes']} codes{quality}"
            rows.append(("images" if name == "image" else name, what))
            rows += [("", line) for line in own.get("remarks", ()) if remarks]
    if result["tasks"]:
        rows.append(("tasks", ", ".join(result["tasks"])))
    rows += _content(result, remarks=remarks)
    if result["rejected"]:
        rows.append(("rejected", f"{numbered(result['rejected'], 'document')}, see rejected.jsonl"))
    pairs(rows)


def _content(result: dict[str, Any], *, remarks: bool) -> list[tuple[str, object]]:
    """Rows about content that both splits have, and content that training repeats."""
    if result["held_out_in_training"] is None:
        return [("held out", "not compared with training documents: they are of a Megatron corpus (data dedup does)")]
    rows: list[tuple[str, object]] = []
    if remarks:
        rows += [("held out", line) for line in result["leaks"]]
        rows += [("", f"`{command}` marks them") for command in result["marked_by"]]
    said = ("documents", "ids")  # by `data prepare`
    rows += [("repeated", line) for key, line in result["repetitions"].items() if remarks or key not in said]
    return rows


def _counts(tokens: dict[str, int]) -> str:
    return " + ".join(f"{number:,} {name}" for name, number in tokens.items())
