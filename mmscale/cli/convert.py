"""Commands that convert models.

`mmscale convert to-hf|from-hf`: a checkpoint as a Hugging Face folder, and back. `to-lm-eval`: an export's held-out
documents as tasks of lm-evaluation-harness. They parse and print; to_hf.py, from_hf.py and lm_eval_tasks.py in
checkpoints_tools/huggingface do the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import NewRun, RunAtStep
from mmscale.cli.named_files import check_export, check_model, check_set, split_step
from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import UsageError
from mmscale.tables.routings import CAUSAL_ROUTINGS, meanings
from mmscale.wording import numbered

app = typer.Typer(
    help="Convert checkpoints to and from Hugging Face folders, and data to tasks of lm-evaluation-harness.",
    no_args_is_help=True,
)
# What an export does after each of its sub-steps.
_AFTER = {
    "weights": "writing configuration and tokenizers",
    "files": "computing the trainer's logits of some prompts",
    "view": "computing the same with transformers, in a process of its own",
    "gate": "publishing",
}


@app.command("to-hf", epilog="Example: mmscale convert to-hf runs/quickstart@1200 exports/quickstart")
def to_hf(
    run: RunAtStep,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; it must not exist.")],
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
            help=f"How experts are selected. {meanings(CAUSAL_ROUTINGS)}",
        ),
    ] = "causal",
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="BYTES", help="Largest file of weights, e.g. 5e9.")
    ] = "5e9",
    licence: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="ID",
            show_default=False,
            help="Licence of the weights for the model card, as the Hugging Face Hub names it, e.g. apache-2.0.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Export a checkpoint for transformers. Published only if transformers computes the same logits as the trainer.

    Dense models need no custom code. An existing export of the same checkpoint is not changed.
    """
    from mmscale.config.values import parse_integer

    folder, step = split_step(run)
    if routing not in CAUSAL_ROUTINGS:
        raise UsageError(
            f"--routing {routing!r} is not a causal routing", remedy=f"choose {', '.join(CAUSAL_ROUTINGS)}"
        )
    size = parse_integer(shard_size)
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"--shard-size {shard_size!r} is not a number of bytes", remedy="write e.g. 5e9")
    check_model(folder, step)
    check_set(data)
    from checkpoints_tools.huggingface import export_checks

    export_checks.check(folder, step, out, data=data, routing=routing)
    from mmscale.runtime.activity import report_activity

    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools.huggingface import to_hf as exporting

        update(f"reading {folder}")
        done = exporting.up_to_date(folder, step, out, routing=routing) if out.exists() else None
        report = done or exporting.export(
            folder,
            step,
            out,
            data=data,
            routing=routing,
            shard_bytes=size,
            licence=licence,
            on_stage=lambda stage: update(_AFTER.get(stage, stage)),
        )
    emit(report, as_json=as_json, text=lambda: _exported(report, again=done is not None))


def _exported(report: dict[str, Any], *, again: bool) -> None:
    gate, model, weights = report["gate"], report["model"], report["weights"]
    files = numbered(len(weights["shards"]), "file")
    code = "transformers' own class" if model["native"] else "trust_remote_code=True"
    rows: list[tuple[str, object]] = [
        ("export", f"{report['path']} (existed already)" if again else report["path"]),
        ("model", f"{model['class']}, {code}"),
        ("routing", model["routing"] or "none: the model does not route"),
        ("weights", f"{weights['tensors']} tensors, {weights['bytes'] / 1e6:.1f} MB, {files}"),
        ("gate", f"passed: logits of {gate['tokens']} tokens differ by {gate['max_abs']:.2g} at most"),
        ("same argmax", f"{gate['argmax_same']} of {gate['tokens']}"),
    ]
    pairs(rows)


@app.command("from-hf", epilog="Example: mmscale convert from-hf exports/quickstart runs/again")
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="HF_DIR",
            help="Folder with config.json, and safetensors or a checkpoint of torchtitan or Megatron-LM.",
        ),
    ],
    run: NewRun,
    image_codes: Annotated[
        int,
        typer.Option(
            "--image-codes", min=0, help="Ids to add for image tokens to a model that is no export of mmscale; 0: none."
        ),
    ] = 0,
    seq_length: Annotated[
        int | None,
        typer.Option("--seq-length", min=1, show_default=False, help="Tokens of a training sequence of such a model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Import a Hugging Face folder as the checkpoint of a new run, which any layout can train.

    Exports of to-hf are imported bit by bit; dense Qwen3, Qwen2 and Llama models can be a starting point. In place of
    safetensors the folder may hold a checkpoint of torchtitan or Megatron-LM, beside config.json and tokenizer.json.
    """
    check_export(folder)
    from mmscale.runtime.activity import report_activity

    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools.huggingface import from_hf as importing

        update(f"reading {folder}")
        result = importing.import_(folder, run, image_codes=image_codes, seq_length=seq_length)
    emit(result, as_json=as_json, text=lambda: pairs(result.items()))


@app.command("to-lm-eval", epilog="Example: mmscale convert to-lm-eval exports/quickstart exports/tasks")
def to_lm_eval(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder of `convert to-hf`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; it must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", show_default=False, help="Prepared data set; default: the run's held-out split."
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option("--batches", min=1, show_default=False, help="Write the documents of the first N global batches."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write tasks of lm-evaluation-harness: the loss of each modality given another, on held-out documents.

    `lm_eval` computes for the export the values that `mmscale eval` calls conditional_loss.
    """
    check_export(folder)
    check_set(data)
    from mmscale.runtime.activity import report_activity

    with report_activity("loading transformers", enabled=not as_json) as update:
        from checkpoints_tools.huggingface.lm_eval_tasks import TAG, TOKENIZER, write_tasks

        update("reading held-out documents")
        result = write_tasks(folder, out, data=data, batches=batches)
    emit(result, as_json=as_json, text=lambda: _tasks(result, model=folder, tag=TAG, tokenizer=TOKENIZER))


def _tasks(result: dict[str, Any], *, model: Path, tag: str, tokenizer: str) -> None:
    rows: list[tuple[str, object]] = [("tasks", result["path"])]
    rows += [
        (name, f"{numbered(found['requests'], 'request')}, {numbered(found['tokens'], 'token')}")
        for name, found in result["tasks"].items()
    ]
    pairs(rows)
    settings = f"pretrained={model},tokenizer={result['path']}/{tokenizer},trust_remote_code=True,dtype=float32"
    print(f"run: lm_eval run --model hf --model_args {settings} --include_path {result['path']} --tasks {tag}")
