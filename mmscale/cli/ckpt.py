"""Commands that show, verify, compare and prune checkpoints.

`mmscale ckpt ...`: shows, verifies, compares and prunes checkpoints; ckpt_copies.py writes new ones. It parses and
prints; checkpoints_tools/ does the work. list, verify and prune do not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli import ckpt_copies, ckpt_mirrors
from mmscale.cli.arguments import Signers
from mmscale.cli.named_files import check_checkpoint, split_step
from mmscale.cli.output import Json, console, emit, pairs, size
from mmscale.errors import CheckpointError, UsageError
from mmscale.runtime.activity import report_activity

app = typer.Typer(
    help="List, show, verify, sign, compare, prune, archive, restore, reshard, average, fuse, mirror and fetch "
    "checkpoints.",
    no_args_is_help=True,
)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
RunAtStep = Annotated[
    str, typer.Argument(metavar="RUN[@STEP]|ARCHIVE", help="Run folder and optionally a step of it, or an archive.")
]


@app.command("list", epilog="Example: mmscale ckpt list runs/quickstart")
def list_(run: Run, as_json: Json = False) -> None:
    """List the checkpoints of a run, without hashing them."""
    from checkpoints_tools.folders import listing

    result = listing(run)
    emit(result, as_json=as_json, text=lambda: _listing(result))


def _listing(result: dict[str, Any]) -> None:
    rows = [
        (
            f"{row['step']} (best)" if row["step"] == result["best"] else row["step"],
            size(row["bytes"]),
            row["files"],
            row.get("attempt", "?"),
            _topology(row.get("topology", {})),
            row.get("code_version", "") or ("" if row["manifest"] else "no manifest"),
        )
        for row in result["checkpoints"]
    ]
    _table(("step", "size", "files", "attempt", "written by", "version"), rows)
    for name in result["bad"]:
        console().print(f"{name}: damaged, renamed to .bad")


@app.command(
    "show",
    epilog="Example: mmscale ckpt show runs/quickstart@1200 --tensor decoder.layers.3.experts.image.w1 --slice 0,3:7",
)
def show(
    run: RunAtStep,
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Show the values of this tensor; a part of its name is enough."),
    ] = None,
    box: Annotated[
        str,
        typer.Option("--slice", metavar="BOX", help="Only this index or range per dimension, e.g. 0 or 0,3:7."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Show tensors, parameters per modality and the origin of a checkpoint, or the values of one tensor."""
    folder, step = split_step(run)
    if tensor is None:
        if box:
            raise UsageError("--slice needs a tensor", remedy="add --tensor NAME")
        check_checkpoint(folder, step)
        with report_activity("loading torch", enabled=not as_json):
            from checkpoints_tools import show as showing

            result = showing.show(folder, step=step)
        emit(result, as_json=as_json, text=lambda: _contents(result))
        return
    check_checkpoint(folder, step, verified=True)
    with report_activity("loading torch", enabled=not as_json):
        from checkpoints_tools.tensor_values import values

        found = values(folder, name=tensor, step=step, box=box)
    emit(found, as_json=as_json, text=lambda: _values(found))


def _values(found: dict[str, Any]) -> None:
    shape = "x".join(map(str, found["shape"])) or "scalar"
    facts: list[tuple[str, object]] = [("tensor", found["name"]), ("of", f"{found['path']}, step {found['step']}")]
    facts.append(("shape", f"{shape} {found['dtype']}"))
    if found["slice"]:
        facts.append(("slice", f"[{found['slice']}] = {'x'.join(map(str, found['selected'])) or 'scalar'}"))
    numbers = {name: found[name] for name in ("min", "max", "mean", "std", "norm")}
    facts += [(name, "-" if number is None else f"{number:.6g}") for name, number in numbers.items()]
    facts.append(("zeros, not finite", f"{found['zeros']:,}, {found['not_finite']:,}"))
    pairs(facts)
    if found["values"] is not None:
        console().print(_rows(found["values"]), markup=False)


def _rows(values: Any) -> str:
    """Nested lists as text, one line for each innermost list."""
    if not isinstance(values, list):
        return f"{values:.6g}"
    if not values or not isinstance(values[0], list):
        return "  ".join(f"{value:.6g}" for value in values)
    return "\n".join(map(_rows, values))


def _contents(result: dict[str, Any]) -> None:
    rows = [(tensor["name"], "x".join(map(str, tensor["shape"])), tensor["dtype"]) for tensor in result["tensors"]]
    sizes = [size(tensor["bytes"]) for tensor in result["tensors"]]
    _table(("tensor", "shape", "type", "size"), [(*row, size) for row, size in zip(rows, sizes, strict=True)])
    origin = result["provenance"]
    parameters = ", ".join(f"{number:,} {name}" for name, number in result["parameters"].items())
    facts: list[tuple[str, object]] = [("checkpoint", result["path"]), ("parameters", parameters)]
    if origin.get("origin"):
        parents = [f"{parent['path']} (step {parent['step']})" for parent in origin["origin"]["parents"]]
        facts.append(("made by", f"{origin['origin']['made_by']} of {', '.join(parents)}"))
    if origin["manifest"]:
        facts += [
            ("written by", f"attempt {origin['attempt']}, {_topology(origin['topology'])}, {origin['code_version']}"),
            ("size", f"{size(origin['bytes'])} in {origin['files']} files"),
        ]
    pairs(facts)


@app.command("verify", epilog="Example: mmscale ckpt verify runs/quickstart")
def verify(
    run: RunAtStep,
    signers: Signers = None,
    as_json: Json = False,
) -> None:
    """Read and hash every file of a checkpoint, or of all checkpoints of a run.

    Exit status 4 if a file is damaged, or if no allowed key has signed a checkpoint.
    """
    from checkpoints_tools import folders

    folder, step = split_step(run)
    result = folders.verify(folder, step=step)
    if signers is not None:
        result = folders.with_signers(folder, result, signers)
    emit(result, as_json=as_json, text=lambda: _verdicts(result))
    bad = [str(row["step"]) for row in result["checkpoints"] if not row["whole"]]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(result['checkpoints'])} checkpoints of {folder} are damaged: step {', '.join(bad)}",
            remedy="use another copy of the archive"
            if result.get("archive")
            else "`mmscale train` resumes from the newest intact one; restore the others from a copy",
        )


def _verdicts(result: dict[str, Any]) -> None:
    for row in result["checkpoints"]:
        said = f"intact, {row['files']} files, {size(row['bytes'])}" if row["whole"] else "; ".join(row["problems"])
        by = f", signed by {row['signer']}" if row.get("signer") else ""
        console().print(f"step {row['step']}: {said}{by}", markup=False)


@app.command("sign", epilog="Example: mmscale ckpt sign runs/quickstart --key ~/.ssh/id_ed25519")
def sign(
    run: RunAtStep,
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="ssh key: without a passphrase, or in ssh-agent.")],
    as_json: Json = False,
) -> None:
    """Verify and sign a checkpoint, or all checkpoints of a run, with an ssh key: MANIFEST.json.sig.

    `mmscale ckpt verify --signers FILE` checks the signature, on any host.
    """
    from checkpoints_tools import folders

    folder, step = split_step(run)
    result = folders.sign(folder, key, step=step)
    emit(
        result, as_json=as_json, text=lambda: pairs([(f"step {row['step']}", row["path"]) for row in result["signed"]])
    )


@app.command("restore-bad", epilog="Example: mmscale ckpt restore-bad runs/quickstart@1200")
def restore_bad(run: RunAtStep, as_json: Json = False) -> None:
    """Verify checkpoints that were renamed to .bad, and rename the intact ones back.

    Exit status 4 if none is intact.
    """
    from checkpoints_tools import folders

    folder, step = split_step(run)
    result = folders.restore_bad(folder, step=step)
    rows = [("restored", ", ".join(map(str, result["restored"])) or "none")]
    rows += [(name, "; ".join(problems)) for name, problems in result["damaged"].items()]
    emit(result, as_json=as_json, text=lambda: pairs(rows))
    if not result["restored"]:
        raise CheckpointError(f"none of {len(rows) - 1} folders is intact", remedy="restore a checkpoint from a copy")


@app.command("diff", epilog="Example: mmscale ckpt diff runs/a@300 runs/b@300 --weights")
def diff(
    one: Annotated[
        str, typer.Argument(metavar="A[@STEP]", help="Run folder and optionally a step of it, or an archive.")
    ],
    other: Annotated[str, typer.Argument(metavar="B[@STEP]", help="Checkpoint to compare with.")],
    weights: Annotated[bool, typer.Option("--weights", help="Exclude the optimizer state.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor."""
    both = split_step(one), split_step(other)
    for folder, step in both:
        check_checkpoint(folder, step, verified=True)
    with report_activity("loading torch", enabled=not as_json) as update:
        from checkpoints_tools import diff as comparing

        update("comparing tensors")
        result = comparing.diff(*both, weights=weights)
    emit(result, as_json=as_json, text=lambda: _differences(result))


def _differences(result: dict[str, Any]) -> None:
    rows = [
        (row["name"], f"{row['max_abs']:.3e}", f"{row['max_rel']:.3e}") for row in result["tensors"] if not row["equal"]
    ]
    if rows:
        _table(("tensor", "largest difference", "of its largest element"), rows)
    for key, words in (("only_in_one", "only in A"), ("only_in_other", "only in B"), ("other_shape", "other shape")):
        for name in result[key]:
            console().print(f"{words}: {name}", markup=False)
    equal = sum(row["equal"] for row in result["tensors"])
    console().print(f"{equal} of {len(result['tensors'])} tensors are equal bit by bit")


@app.command("prune", epilog="Example: mmscale ckpt prune runs/quickstart --keep 2")
def prune(
    run: Run,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", min=1, help="Number of newest intact checkpoints to keep.")
    ],
    as_json: Json = False,
) -> None:
    """Delete old checkpoints; at least two that were just verified are kept."""
    from checkpoints_tools import folders

    result = folders.prune(run, keep=keep)
    kept, deleted = (", ".join(map(str, result[key])) or "none" for key in ("kept", "deleted"))
    emit(result, as_json=as_json, text=lambda: pairs([("deleted", deleted), ("kept", kept)]))


app.command("archive", epilog="Example: mmscale ckpt archive runs/quickstart@1200 quickstart-1200.zarr")(
    ckpt_copies.archive
)
app.command("restore", epilog="Example: mmscale ckpt restore quickstart-1200.zarr runs/restored")(ckpt_copies.restore)
app.command("reshard", epilog="Example: mmscale ckpt reshard runs/big@9000 runs/big-for-eval --files 8 --weights")(
    ckpt_copies.reshard
)
app.command("average", epilog="Example: mmscale ckpt average runs/a@800 runs/a@900 runs/a@1000 runs/mean")(
    ckpt_copies.average
)
app.command("fuse", epilog="Example: mmscale ckpt fuse runs/text@1000 runs/image@1000 runs/fused --steps 200")(
    ckpt_copies.fuse
)
app.command("upcycle", epilog="Example: mmscale ckpt upcycle runs/1t1i@10000 runs/4t4i --experts text=4,image=4")(
    ckpt_copies.upcycle
)
app.command("mirror", epilog="Example: mmscale ckpt mirror runs/quickstart")(ckpt_mirrors.mirror)
app.command("fetch", epilog="Example: mmscale ckpt fetch s3://bucket/runs/quickstart runs/quickstart")(
    ckpt_mirrors.fetch
)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("step", "size", "files", "attempt") else "left")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console().print(table)


def _topology(topology: dict[str, int]) -> str:
    ranks = topology.get("world_size", 0)
    rest = [f"{name} {size}" for name, size in topology.items() if name != "world_size" and size > 1]
    return ", ".join([f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "?", *rest])
