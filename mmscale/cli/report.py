# `mmscale report`: curves of runs as a page or a picture. Drawing is report/'s.
# Needs no torch.
"""Command that reports on runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.output import Json, emit
from mmscale.errors import UsageError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="report.html, or a .png of the curves alone.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Draw loss curves per modality, held-out losses, gradient norm, learning rate and throughput of runs."""
    if out.suffix not in (".html", ".png"):
        raise UsageError(f"--out {out}: a report is .html or .png", remedy="write --out report.html")
    from mmscale.report import figures, page

    if out.suffix == ".png":
        figures.loss_curves(runs, out)
    else:
        page.write_page(runs, out)
    emit(
        {"out": str(out), "runs": [str(run) for run in runs]}, as_json=as_json, text=lambda: typer.echo(f"wrote {out}")
    )
