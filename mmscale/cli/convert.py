# `mmscale convert to-hf|from-hf`: a checkpoint as a Hugging Face folder, and back.
# They parse and print; checkpoints_tools/to_hf.py and from_hf.py do the work.
"""Commands that convert models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.output import Json, emit, pairs
from mmscale.cli.train import split_step
from mmscale.errors import UsageError

app = typer.Typer(help="Convert checkpoints to and from Hugging Face folders.", no_args_is_help=True)
_ROUTINGS = ("causal", "top1", "threshold")


@app.command("to-hf", epilog="Example: mmscale convert to-hf runs/quickstart@1200 exports/quickstart")
def to_hf(
    run: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="Run folder, and a step of it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            show_default=False,
            help="Prepared data set with the tokenizers; default: the run's.",
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            help="Who chooses experts: causal (auxiliary routers), top1 (their best), threshold (averaged cut-offs).",
        ),
    ] = "causal",
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="BYTES", help="Largest file of weights, e.g. 5e9.")
    ] = "5e9",
    as_json: Json = False,
) -> None:
    """Export a checkpoint for transformers; it is published only if both compute the same logits.

    Dense models need no code of ours. An export of this very checkpoint that stands there already is left as it is.
    """
    from mmscale.config.values import parse_integer

    folder, step = split_step(run)
    if routing not in _ROUTINGS:
        raise UsageError(f"--routing {routing!r} is not a causal routing", remedy=f"choose {', '.join(_ROUTINGS)}")
    size = parse_integer(shard_size)
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"--shard-size {shard_size!r} is not a number of bytes", remedy="write e.g. 5e9")
    from checkpoints_tools import to_hf as exporting

    done = exporting.up_to_date(folder, step, out, routing=routing) if out.exists() else None
    report = done or exporting.export(folder, step, out, data=data, routing=routing, shard_bytes=size)
    emit(report, as_json=as_json, text=lambda: _exported(report, again=done is not None))


def _exported(report: dict[str, Any], *, again: bool) -> None:
    gate, model, weights = report["gate"], report["model"], report["weights"]
    code = "transformers' own class" if model["native"] else "trust_remote_code=True"
    rows: list[tuple[str, object]] = [
        ("export", f"{report['path']} (was there already)" if again else report["path"]),
        ("model", f"{model['class']}, {code}"),
        ("routing", model["routing"] or "none: every token takes the same way"),
        ("weights", f"{weights['tensors']} tensors, {weights['bytes'] / 1e6:.1f} MB, {len(weights['shards'])} files"),
        ("gate", f"passed: logits of {gate['tokens']} tokens differ by {gate['max_abs']:.2g} at most"),
        ("same argmax", f"{gate['argmax_same']} of {gate['tokens']}"),
    ]
    pairs(rows)


@app.command("from-hf", epilog="Example: mmscale convert from-hf exports/quickstart runs/again")
def from_hf(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder with config.json and safetensors.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a new run.")],
    image_codes: Annotated[
        int,
        typer.Option("--image-codes", min=0, help="A foreign model: ids to add for image tokens; 0: none."),
    ] = 0,
    seq_length: Annotated[
        int | None,
        typer.Option("--seq-length", min=1, show_default=False, help="A foreign model: tokens of a training sequence."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a Hugging Face folder the checkpoint of a new run: train goes on from it at any layout.

    Reads what to-hf wrote bit by bit, and dense Qwen3 and Llama models as a starting point.
    """
    from checkpoints_tools import from_hf as importing

    result = importing.import_(folder, run, image_codes=image_codes, seq_length=seq_length)
    emit(result, as_json=as_json, text=lambda: pairs(result.items()))
