# One HTML page about runs: a table of what they reached and the curves. Opens anywhere: no script, no other file.
# It draws nothing itself (figures.py does) and measures nothing.
"""The report page."""

from __future__ import annotations

import base64
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmscale.report.figures import HELD_OUT, loss_curves, read_history, run_names
from mmscale.train.metrics import EVAL, read_events

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:72em;margin:2em auto;padding:0 1em}"
    "img{max-width:100%}table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:.25em .9em;border-bottom:1px solid #ddd;text-align:right}th:first-child{text-align:left}"
)
_QUIET_EVENTS = ("start", "resume", "save_begin", "save_committed", "finish")


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page.

    Args:
        runs: Run folders.
        out: HTML file.

    Raises:
        UsageError: A run has no metrics.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "curves.png"
        loss_curves(runs, picture)
        curves = base64.b64encode(picture.read_bytes()).decode()
    facts = {name: summarize(run) for name, run in zip(run_names(runs), runs, strict=True)}
    title = escape(", ".join(facts))
    out.parent.mkdir(parents=True, exist_ok=True)
    alternative = "loss, gradient norm, learning rate and tokens per second"
    lines = (
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>',
        f"<body><h1>{title}</h1>",
        _table(facts),
        f'<img alt="{alternative}" src="data:image/png;base64,{curves}">',
        "</body></html>\n",
    )
    out.write_text("\n".join(lines), encoding="utf-8")


def summarize(run: Path) -> dict[str, str]:
    """What a run reached, as words by row name; what was not measured is left out."""
    records, events = read_history(run), read_events(run)
    facts = {"last step": f"{records[-1]['step']:,}"}
    for key in dict.fromkeys(key for record in records for key in record if key.split("/")[0] in ("loss", EVAL[:-1])):
        if isinstance(value := _last(records, key), int | float):
            facts[f"{key.removeprefix(EVAL)}, {HELD_OUT}" if key.startswith(EVAL) else key] = f"{value:.4f}"
    for key, name, form in (
        ("tokens_per_second", "tokens per second, median", "{:,.0f}"),
        ("model_tflops_per_rank", "model TFLOP/s per rank, median", "{:.3g}"),
        ("mfu", "MFU, median", "{:.1%}"),
    ):
        values = [record[key] for record in records if key in record]
        if values:
            facts[name] = form.format(statistics.median(values))
    facts["attempts"] = str(max(record.get("attempt", 1) for record in records))
    unusual = Counter(str(event.get("event")) for event in events if event.get("event") not in _QUIET_EVENTS)
    return facts | {name: str(number) for name, number in sorted(unusual.items())}


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def _table(facts: dict[str, dict[str, str]]) -> str:
    rows = list(dict.fromkeys(row for values in facts.values() for row in values))
    head = "".join(f"<th>{escape(name)}</th>" for name in facts)
    body = "".join(_row(row, [values.get(row, "-") for values in facts.values()]) for row in rows)
    return f"<table><tr><th></th>{head}</tr>\n{body}</table>"


def _row(name: str, values: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f"<tr><th>{escape(name)}</th>{cells}</tr>\n"
