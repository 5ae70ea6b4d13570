# `mmscale report`: runs as one HTML page and PNGs. Reading and drawing are report/'s, goodput is launch/'s.
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
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="RUN",
            show_default=False,
            help="Compare at equal loss with this run; else a dense one.",
        ),
    ] = None,
    png: Annotated[
        bool, typer.Option("--png/--no-png", help="Write each figure as OUT_<figure>.png beside the page too.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show runs on one HTML page: losses, optimization, throughput, routing, layers, faults, settings."""
    if out.suffix not in (".html", ".png"):
        raise UsageError(f"--out {out}: a report is .html or .png", remedy="write --out report.html")
    written = _curves(runs, out) if out.suffix == ".png" else _page(runs, out, baseline=baseline, png=png)
    emit(
        {"out": str(out), "runs": [str(run) for run in runs], "files": [str(file) for file in written]},
        as_json=as_json,
        text=lambda: typer.echo("\n".join(f"wrote {file}" for file in written)),
    )


def _curves(runs: list[Path], out: Path) -> list[Path]:
    from mmscale.report import figures

    figures.loss_curves(runs, out)
    return [out]


def _page(runs: list[Path], out: Path, *, baseline: Path | None, png: bool) -> list[Path]:
    from launch.goodput import goodput
    from mmscale.report import comparison_section, page, pictures

    found = page.read_runs(runs, goodput=goodput)
    first = baseline or comparison_section.baseline_of(found)
    sections = {comparison_section.HEADING: comparison_section.comparison_section(first, found)} if first else {}
    drawn = page.curves(found)
    page.write_page(found, out, drawn=drawn, sections=sections)
    return [out, *(pictures.write_pictures(found, out, drawn=drawn) if png else [])]
