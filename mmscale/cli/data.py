# `mmscale data prepare`, `inspect` and `verify`: calls data/prepare.py, data/inspect_set.py and data/digests.py.
# What a document or a data set is stands there, not here.
"""Commands about data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.output import Json, Overrides, emit, pairs
from mmscale.errors import DataError, UsageError

app = typer.Typer(help="Prepare data sets and look into them.", no_args_is_help=True)

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
            "--documents", metavar="FILE", help="JSONL, parquet or .tar of documents; globs; may be repeated."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what --out holds of other documents.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad document.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Tokenize text and images into an indexed data set; parallel, and resumable by running it again."""
    changes = list(overrides or [])
    if "=" in spec:  # no SPEC: the first setting stands in its place
        changes.insert(0, spec)
        spec = ""
    config = _spec(spec, changes, documents or [])
    from mmscale.data import inspect_set
    from mmscale.data import prepare as preparing

    preparing.prepare(config, out, overwrite=overwrite, strict=strict or None, workers=workers, progress=not as_json)
    result = inspect_set.summary(out)
    emit(result, as_json=as_json, text=lambda: _summary(result))


def _spec(spec: str, overrides: list[str], documents: list[str]) -> Any:
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data set.")],
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=0, help="Decode document N to text and PNG files.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the sample.")] = "train",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the sample's PNG files.")] = Path(
        "sample"
    ),
    held_out: Annotated[
        bool, typer.Option("--held-out", help="List the documents of the held-out split, one per line.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show documents and tokens of each modality, or one document as text and PNG."""
    from mmscale.data import inspect_set

    if held_out:
        documents = enumerate(inspect_set.lines(folder, "validation"))
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
    drawn = inspect_set.draw_sample(folder, sample, out, split=split)
    rows = [("text", drawn["text"]), ("tokens", _counts(drawn["tokens"])), ("drawn on", drawn["sheet"])]
    emit(drawn, as_json=as_json, text=lambda: pairs(rows))


@app.command("verify", epilog="Example: mmscale data verify data/digits")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data set.")], as_json: Json = False
) -> None:
    """Read and hash every file of a data set.

    Exit status 3 if a file is not what was prepared. Data sets of older versions have no digests: sizes are compared.
    """
    from mmscale.data import digests
    from mmscale.data.manifest import read_manifest

    read_manifest(folder)
    wanted = digests.read(folder)
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


def _verdict(result: dict[str, Any]) -> None:
    words = f"{result['files'] - len(result['damaged'])} of {result['files']} files are as they were prepared"
    if not result["digests"]:
        words = "no digests: it was prepared by an older version; files are there and of their sizes"
    pairs([("data set", result["folder"]), ("verified", words), *result["damaged"].items()])


def _summary(result: dict[str, Any]) -> None:
    rows: list[tuple[str, object]] = [("data set", result["folder"])]
    for name, split in result["splits"].items():
        lengths = split.get("document_tokens")
        mean = f"; {lengths['mean']:g} a document ({lengths['shortest']}..{lengths['longest']})" if lengths else ""
        rows.append((name, f"{split['documents']:,} documents, {_counts(split['tokens'])} tokens{mean}"))
    ranges = result["vocabulary"]["ranges"]
    rows.append(("ids", ", ".join(f"{name} {first}..{end - 1}" for name, (first, end) in ranges.items())))
    image = result.get("image_tokenizer")
    if image:
        each = f"{image['tokens_per_image']} tokens each, {image['codes']} codes"
        quality = f", PSNR {image['psnr_db']:.1f} dB" if isinstance(image.get("psnr_db"), float) else ""
        rows.append(("images", f"{image['kind']}, {image['size']}x{image['size']} pixels, {each}{quality}"))
    if result["tasks"]:
        rows.append(("tasks", ", ".join(result["tasks"])))
    for what, (common, total) in result["held_out_in_training"].items():
        if common:
            rows.append(("held out", f"{common:,} of {total:,} {what} are in training documents too"))
    if result["rejected"]:
        rows.append(("rejected", f"{result['rejected']:,} documents, see rejected.jsonl"))
    pairs(rows)


def _counts(tokens: dict[str, int]) -> str:
    return " + ".join(f"{number:,} {name}" for name, number in tokens.items())
