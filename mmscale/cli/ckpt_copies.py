"""Commands that copy and combine checkpoints.

`mmscale ckpt archive|restore|reshard|average|fuse|upcycle`: the commands that write new checkpoints from old ones. They
parse and print; checkpoints_tools/copying.py, average.py, fuse.py and upcycle.py do the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import NewRun, RunAtStep
from mmscale.cli.named_files import split_step
from mmscale.cli.output import Json, emit, pairs, size
from mmscale.errors import UsageError
from mmscale.runtime.activity import report_activity
from mmscale.tables.settings import UNTIED

Weights = Annotated[bool, typer.Option("--weights", help="Exclude the optimizer state.")]


def archive(
    run: RunAtStep,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the archive; it must not exist.")],
    weights: Weights = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a zarr v3 archive: no layout, no pickles, partial reads, a checksum for every chunk.

    Random states are not stored: a run that resumes from the archive gets new ones.
    """
    from checkpoints_tools.refusals import check_archive

    folder, step = split_step(run)
    check_archive(folder, step, out)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import copying

        update(f"writing {out}")
        result = copying.archive(folder, step, out, weights=weights)
    _emit(result, as_json=as_json)


def restore(
    path: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Folder of the archive.")],
    run: NewRun,
    as_json: Json = False,
) -> None:
    """Make a new run from an archive. Any layout can train it, and `eval` can evaluate it."""
    from checkpoints_tools.refusals import check_restore

    check_restore(path, run)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import copying

        update(f"writing {run}")
        result = copying.restore(path, run)
    _emit(result, as_json=as_json)


def reshard(
    run: RunAtStep,
    out: NewRun,
    weights: Weights = False,
    files: Annotated[
        int | None,
        typer.Option(
            "--files",
            metavar="N",
            min=1,
            show_default=False,
            help="Number of files with tensors; default: one for every GiB.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint into a new run with fewer (or more) files.

    Every layout loads every checkpoint as it is. This command merges the files of many ranks for copying, or for file
    systems with few inodes. With --weights it omits two thirds or more of the bytes.
    """
    from checkpoints_tools.refusals import check_copy

    folder, step = split_step(run)
    check_copy(folder, step, out)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import copying

        update(f"writing {out}")
        result = copying.reshard(folder, step, out, weights=weights, files=files)
    _emit(result, as_json=as_json)


def average(
    paths: Annotated[
        list[str], typer.Argument(metavar="RUN@STEP RUN@STEP ... OUT", help="Two checkpoints or more, and a new run.")
    ],
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema",
            metavar="DECAY",
            show_default=False,
            help="Decay of an exponential moving average from the first to the last one, instead of the mean.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Average the weights of several checkpoints of one model. The result is a checkpoint without optimizer state."""
    if len(paths) < 3:
        raise UsageError(
            "average needs two checkpoints or more, and a folder for the result", remedy="RUN@100 RUN@200 ... OUT"
        )
    from checkpoints_tools.refusals import check_average

    *names, out = paths
    checkpoints = [split_step(name) for name in names]
    check_average(checkpoints, Path(out), ema=ema)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import average as averaging

        update(f"writing {out}")
        result = averaging.average(checkpoints, Path(out), ema=ema)
    _emit(result, as_json=as_json)


def fuse(
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT[@STEP]", help="The text model: a run and optionally a step of it, an archive, or an export."
        ),
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE[@STEP]", help="The image model, likewise.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a new run.")],
    average: Annotated[
        bool, typer.Option("--average", help="Write the mean of all weights instead of a Mixture-of-Transformers.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, show_default="the text model's", help="train.steps of the new run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fuse a text model and an image model of one shape into one with weights for each modality.

    Text tokens have the weights of the text model, all others those of the image model. The result has no optimizer
    state. Any layout can train it.
    """
    from checkpoints_tools.refusals import check_fuse

    models = split_step(text), split_step(image)
    check_fuse(*models, out, average=average, steps=steps)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import fuse as fusing

        update(f"writing {out}")
        result = fusing.fuse(*models, out, average=average, steps=steps)
    _emit(result, as_json=as_json)


def upcycle(
    run: RunAtStep,
    out: NewRun,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="NAME=N,...", help="Experts of each group, e.g. text=4,image=4 or mixed=8."),
    ] = None,
    untie: Annotated[
        str | None,
        typer.Option(
            "--untie",
            metavar="PART,...",
            help="Parts that get weights of their own for each modality: attention, ffn, norms.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            metavar="K",
            show_default="experts choose tokens",
            help="Tokens choose K of the new experts (model.experts.token_choice).",
        ),
    ] = None,
    ungated: Annotated[
        str | None,
        typer.Option(
            "--ungated",
            metavar="NAME,...",
            help="Groups of one new expert without a router: it takes every token of its modality.",
        ),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option("--split", min=2, metavar="N", help="Cut the FFN into N experts of each group; needs --shared."),
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option("--shared", metavar="keep", help="With --split: keep the whole FFN as a shared expert."),
    ] = None,
    keep_moments: Annotated[
        bool, typer.Option("--keep-moments", help="Copy the FFN's optimizer moments too; default: they start at 0.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, show_default="what the old run has left", help="train.steps of the new run."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, show_default="run.seed", help="Seed of the new routers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a model with several experts from one with one FFN or one expert per modality, or untie its parts.

    Any layout can train the result. Experts are copies, routers are new and router noise is on; untied weights are
    copies, too, and compute the same. The learning-rate schedule starts again; the position in the data is kept.
    """
    from checkpoints_tools.refusals import check_upcycle

    folder, step = split_step(run)
    if (split is None) != (shared is None) or shared not in (None, "keep"):
        raise UsageError(
            "--split and --shared keep belong together: a part of the FFN alone computes something else",
            remedy="give both: --split 4 --shared keep",
        )
    wanted: dict[str, Any] = {
        "experts": {} if experts is None else _counts(experts),
        "untie": [] if untie is None else _parts(untie),
        "top_k": top_k,
        "ungated": [] if ungated is None else [name.strip() for name in ungated.split(",")],
        "split": split,
        "steps": steps,
    }
    check_upcycle(folder, step, out, **wanted)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import upcycle as upcycling

        update(f"writing {out}")
        result = upcycling.upcycle(folder, step, out, **wanted, keep_moments=keep_moments, seed=seed)
    _emit(result, as_json=as_json)


def _counts(text: str) -> dict[str, int]:
    """Parses `text=4,image=4` into numbers.

    Raises:
        UsageError: the text has another form.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition("="))
        if not name or not count.isdigit() or int(count) < 1 or name in found:
            raise UsageError(f"--experts {text}: {part!r} is not NAME=N", remedy="write e.g. text=4,image=4")
        found[name] = int(count)
    return found


def _parts(text: str) -> list[str]:
    """Parses `attention,norms`.

    Raises:
        UsageError: it names something else, or a part twice.
    """
    found = [part.strip() for part in text.split(",")]
    if unknown := [part for part in found if part not in UNTIED]:
        raise UsageError(f"--untie {text}: {unknown[0]!r} is no part", remedy=f"name some of {', '.join(UNTIED)}")
    if len(set(found)) < len(found):
        raise UsageError(f"--untie {text} names a part twice", remedy="name each part once")
    return found


def _emit(result: dict[str, Any], *, as_json: bool) -> None:
    parents = [f"{parent['path']} (step {parent['step']})" for parent in result["origin"]["parents"]]
    holds = "weights and optimizer state" if result["contents"] == "training" else "weights"
    facts: list[tuple[str, object]] = [
        ("wrote", result["path"]),
        ("step", result["step"]),
        ("holds", f"{result['tensors']} tensors: {holds}"),
        ("size", f"{size(result['bytes'])} in {result['files']} files"),
        ("made of", ", ".join(parents)),
    ]
    if "coefficients" in result:
        facts.append(("coefficients", ", ".join(f"{count:.4g}" for count in result["coefficients"])))
    if "fused" in result:
        facts.append(("fused as", result["fused"]))
        facts.append(("continues", f"{result['next']}: {result['steps']} steps, without optimizer state"))
    if "experts" in result:
        facts.append(("experts", ", ".join(f"{count} of {name}" for name, count in result["experts"].items())))
        facts.append(("computes the same", result["preserves"]))
        facts.append(("continues", f"{result['next']}: {result['steps']} steps after {result['sequences']} sequences"))
    emit(result, as_json=as_json, text=lambda: pairs(facts))
