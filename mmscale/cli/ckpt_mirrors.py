"""Commands for mirrors of checkpoints.

`mmscale ckpt mirror|fetch`: copies of checkpoints in an object store. They parse and print;
checkpoints_tools/mirrors.py does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import NewRun, Signers
from mmscale.cli.output import Json, emit, pairs, size
from mmscale.errors import CheckpointError, UsageError
from mmscale.tables.mirror_urls import protocol_of


def mirror(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; its config.yaml has checkpoint.mirror.")],
    as_json: Json = False,
) -> None:
    """Upload the checkpoints that are missing in a run's mirror, as training does, and delete old ones there.

    Exit status 4 if a checkpoint is damaged or the store cannot be reached.
    """
    from checkpoints_tools import mirrors

    result = mirrors.mirror(run)
    emit(result, as_json=as_json, text=lambda: pairs(_uploads(result)))
    if result["refused"]:
        name, why = next(iter(result["refused"].items()))
        raise CheckpointError(
            f"{name} was not uploaded: {why}", remedy="`mmscale ckpt verify RUN` names what is damaged"
        )


def _uploads(result: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (f"uploaded step {one['step']}", f"{size(one['bytes'])} in {one['seconds']:.1f} s, {one['name']}")
        for one in result["uploaded"]
    ]
    return rows or [("up to date", result["mirror"])]


def fetch(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL[@STEP]", help="URL of the run in the mirror: checkpoint.mirror, a slash and the run's name."
        ),
    ],
    run: NewRun,
    signers: Signers = None,
    as_json: Json = False,
) -> None:
    """Fetch the newest complete checkpoint of a mirrored run, verify it and make it a run that can be resumed.

    With @STEP only that checkpoint of the main stage, also into a run that has others. Nothing half-written is left.
    """
    from checkpoints_tools import mirrors

    protocol_of(url)  # first, because the next message shows the URL
    place, at, step = url.rpartition("@")
    if at and "/" not in step and not step.isdigit():
        raise UsageError(f"{url}: {step!r} after the @ is not a step", remedy=f"write a number, e.g. {place}@100")
    named = bool(at) and step.isdigit()
    result = mirrors.fetch(place if named else url, int(step) if named else None, run, signers=signers)
    rows = [
        (f"{one['stage']} step {one['step']}", f"{size(one['bytes'])} in {one['files']} files, {one['path']}")
        for one in result["fetched"]
    ]
    go_on = ("continue", f"mmscale train {run}/config.yaml")
    emit(result, as_json=as_json, text=lambda: pairs([*rows, go_on]))
