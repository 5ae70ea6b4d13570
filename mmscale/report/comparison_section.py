"""The report page's section on equal loss.

Converts the result of compare.py to HTML. If runs cannot be compared the section gives the reason.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mmscale.errors import UsageError
from mmscale.report.compare import compare
from mmscale.report.compare_view import render, step_matching
from mmscale.report.figure_style import save_figure
from mmscale.report.page import Run
from mmscale.tables.settings import KINDS

HEADING = "Equal loss"


def baseline_of(runs: Sequence[Run]) -> Path | None:
    """The default baseline: the first dense run, if there is also one that is not dense."""
    kinds = {run.path: run.settings.get("model.kind") for run in runs}
    experts = {run: KINDS[str(kind)].experts for run, kind in kinds.items() if kind in KINDS}
    dense = [run for run, has in experts.items() if not has]
    return dense[0] if dense and any(experts.values()) else None


def comparison_section(baseline: Path, runs: Sequence[Run]) -> str:
    """FLOPs and seconds that runs need for a baseline's losses, with the step-matching plot.

    Args:
        baseline: run folder.
        runs: from `page.read_runs`; the baseline may be among them.
    """
    try:
        others = [run.path for run in runs if run.path.resolve() != baseline.resolve()]
        known = {run.path.resolve(): run for run in runs}
        histories = {place: run.history for place, run in known.items()}
        parts = {place: run.parts for place, run in known.items()}
        found = compare(baseline, others, histories=histories, parts=parts)
    except UsageError as error:
        return f'<p class="sub">{escape(error.cause)}</p>'
    picture = io.BytesIO()
    save_figure(step_matching(found), picture)
    encoded = base64.b64encode(picture.getvalue()).decode()
    image = f'<img alt="step matching" style="max-width:100%;border-radius:8px" src="data:image/png;base64,{encoded}">'
    return _as_html(render(found)) + image


def _as_html(markdown: str) -> str:
    """Converts paragraphs and tables, the only Markdown that `render` writes."""
    parts: list[str] = []
    rows: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not all(set(cell) <= set(":-") for cell in cells):
                kind = "td" if rows else "th"
                rows.append(f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>")
            continue
        if rows:
            parts.append(f'<div class="table"><table>{"".join(rows)}</table></div>')
            rows = []
        if line.strip():
            parts.append(f"<p>{escape(line)}</p>")
    return "\n".join(parts)
