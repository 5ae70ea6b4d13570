"""The command that reports on runs.

`mmscale report`: runs as one HTML page and PNGs. report/ reads and draws, launch/ computes goodput. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.output import Json, emit
from mmscale.errors import UsageError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="report.html, or a .png of the curves only.")
    ] = Path("report.html"),
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="RUN",
            show_default=False,
            help="Run to compare with at equal loss; default: a dense one.",
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Also write each figure as OUT_<figure>.png.")] = True,
    as_json: Json = False,
) -> None:
    """Show runs on one HTML page: losses, optimization, throughput, routing, layers, data, faults, settings."""
    if out.suffix not in (".html", ".png"):
        raise UsageError(f"--out {out}: a report is .html or .png", remedy="write --out report.html")
    blocked = out if out.is_dir() else next((place for place in out.parents if place.is_file()), None)
    if blocked is not None:
        what = "folder" if blocked == out else "file"
        raise UsageError(f"--out {out}: {blocked} is a {what}", remedy="name another place, e.g. --out report.html")
    from mmscale.runs.is_run import check_runs
    from mmscale.runtime.activity import report_activity

    check_runs([*runs, *([baseline] if baseline else [])])
    with report_activity(f"loading what {out} needs", enabled=not as_json) as update:
        written = _curves(runs, out) if out.suffix == ".png" else _page(runs, out, update, baseline=baseline, png=png)
    emit(
        {"out": str(out), "runs": [str(run) for run in runs], "files": [str(file) for file in written]},
        as_json=as_json,
        text=lambda: typer.echo("\n".join(f"wrote {file}" for file in written)),
    )


def _curves(runs: list[Path], out: Path) -> list[Path]:
    from mmscale.report import figures

    figures.loss_curves(runs, out)
    return [out]


def _page(
    runs: list[Path], out: Path, update: Callable[[str], None], *, baseline: Path | None, png: bool
) -> list[Path]:
    from launch.goodput import goodput
    from mmscale.report import comparison_section, page, pictures, sources_section

    update(f"reading {', '.join(map(str, runs))}")
    found = page.read_runs(runs, goodput=goodput)
    first = baseline or comparison_section.baseline_of(found)
    sections = {comparison_section.HEADING: comparison_section.comparison_section(first, found)} if first else {}
    if passes := sources_section.sources_section(found):
        sections[sources_section.HEADING] = passes
    update(f"writing {out}")
    drawn = page.curves(found)
    page.write_page(found, out, drawn=drawn, sections=sections)
    if not png:
        return [out]
    update("drawing the figures as PNG (--no-png leaves them out)")
    return [out, *pictures.write_pictures(found, out, drawn=drawn), *sources_section.write_passes(found, out)]
