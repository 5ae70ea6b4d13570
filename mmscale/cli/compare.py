"""The command that compares runs at equal loss.

`mmscale compare`: the work that models need for a baseline's losses. report/compare.py computes it. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.output import Json, emit
from mmscale.errors import UsageError


def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="Run folder, usually of a dense model.")],
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders; runs that differ only in seed are one model."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", show_default=False, help="Draw the step-matching plot: a .png."),
    ] = None,
    at: Annotated[
        str,
        typer.Option(
            "--at", metavar="SHARES", help="Levels: the baseline's losses after these shares of its FLOPs, e.g. 0.5,1."
        ),
    ] = "0.25,0.5,0.75,1",
    loss: Annotated[
        list[float] | None,
        typer.Option("--loss", metavar="LOSS", show_default=False, help="Compare at this loss too; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the FLOPs and seconds that models need for a baseline's losses (eta), per modality and overall.

    Compares training losses as in the paper, held-out losses, and held-out losses under causal routing. If one of the
    two never reaches a loss, the result is a bound.
    """
    shares = _shares(at)
    if out is not None and out.suffix != ".png":
        raise UsageError(f"--out {out}: the plot is a .png", remedy="write --out eta.png")
    from mmscale.report import compare as comparing
    from mmscale.report import compare_view, figure_style

    found = comparing.compare(baseline, runs, shares=shares, losses=loss or ())
    if out is not None:
        figure_style.save_figure(compare_view.step_matching(found), out)
    emit(found.as_dict(), as_json=as_json, text=lambda: typer.echo(compare_view.render(found)))


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise UsageError(f"--at {text!r}: needs shares above 0 and up to 1", remedy="write e.g. --at 0.25,0.5,1")
    return shares
