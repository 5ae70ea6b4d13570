"""Writes the report: one self-contained HTML page.

The page contains its style, script and data, and needs no network. This module combines the results of history, charts,
layers, timeline and facts; the script (assets/*.js) draws.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from mmscale.report import facts
from mmscale.report.accuracy_charts import guessing_of
from mmscale.report.axes import axes_of, clock_of, first_time
from mmscale.report.breaks import Cut, cuts_of
from mmscale.report.chart import Chart
from mmscale.report.charts import modalities_of
from mmscale.report.curves import Curves, curves_of
from mmscale.report.downsample import Curve
from mmscale.report.figures import run_names
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import Floats, History, read
from mmscale.report.layers import BYTES, layers_of
from mmscale.report.timeline import Goodput, Timeline, timeline_of
from mmscale.runs.display_names import TIME_PARTS
from mmscale.runs.events import BEGINS, read_events
from mmscale.runs.is_run import check_runs
from mmscale.runs.recorded_leaks import leaks_in
from mmscale.runs.recorded_preparation import preparation_in
from mmscale.wording import numbered

_SCRIPTS = ("base.js", "chart.js", "layers.js", "timeline.js", "page.js")
_EVENTS_SHOWN = 200
_DIGITS = 5


@dataclass(frozen=True)
class Run:
    """The data of a run for a report.

    Attributes:
        name: short and unique.
        path: its folder.
        settings: its configuration by dotted key, as written; empty if none can be read.
        history: its figures.
        axes: the x axes of its figures.
        events: of events.jsonl.
        timeline: its attempts, saves and faults.
        layers: records of layers.jsonl.
        cuts: where its curves are broken.
        parts: of held-out sets that its attempts read.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    history: History
    axes: dict[str, Floats]
    events: list[dict[str, Any]]
    timeline: Timeline
    layers: list[dict[str, Any]]
    cuts: list[Cut]
    parts: HeldOutParts = field(default_factory=HeldOutParts)


def read_runs(runs: Sequence[Path], *, goodput: Goodput) -> list[Run]:
    """Read all data that a report shows.

    Args:
        runs: run folders.
        goodput: function that computes goodput.

    Raises:
        UsageError: a folder is not a run.
    """
    check_runs(runs)
    found = []
    for name, path in zip(run_names(runs), runs, strict=True):
        history, events = read(path), read_events(path)
        clock = clock_of(history, events)
        begin = first_time(events, clock=clock)
        found.append(
            Run(
                name,
                path,
                facts.settings(path, attempt=history.attempt),
                history,
                axes_of(path, history, clock=clock, begin=begin),
                events,
                timeline_of(events, history, begin=begin, goodput=goodput),
                layers_of(path, limit=BYTES // len(runs)),
                cuts_of(path, events, name=name if len(runs) > 1 else ""),
                HeldOutParts.of_run(path, events),
            )
        )
    return found


def curves(runs: Sequence[Run]) -> Curves:
    """The curves for `write_page` and `pictures.write_pictures`; computed once for both."""
    return curves_of(
        {run.name: run.history for run in runs},
        [run.axes for run in runs],
        cuts=[run.cuts for run in runs],
        guessing=[guessing_of(run.events) for run in runs],
        parts=[run.parts for run in runs],
    )


def write_page(
    runs: Sequence[Run], out: Path, *, drawn: Curves | None = None, sections: Mapping[str, str] | None = None
) -> None:
    """Write the page.

    Args:
        runs: from `read_runs`.
        out: HTML file.
        drawn: from `curves`; None: they are made here.
        sections: further sections by heading, as HTML that is safe to show.
    """
    drawn = drawn or curves(runs)
    charts = drawn.charts
    data = _data(runs, drawn)
    body = [_notes(runs), *_overview(runs), *_chart_sections(charts), _layers_section()]
    body += [_section(heading, content) for heading, content in (sections or {}).items()]
    body += [_timeline_section(runs), _configuration(runs), _environment(runs)]
    files = resources.files("mmscale.report") / "assets"
    page = string.Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(run.name for run in runs)),
        subtitle=escape(_subtitle(runs)),
        style=(files / "page.css").read_text(encoding="utf-8"),
        nav="".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in _headings(charts, sections or {})),
        body="\n".join(part for part in body if part),
        footer="Drag over a chart to zoom, double-click to go back; click a name in a legend to hide it. "
        "Bands reach from the lowest to the highest value; ▲ marks values above the scale, in red what is not finite. "
        "A ring marks the lowest held-out loss.",
        # A "<" could end the script element, so it is escaped.
        data=orjson.dumps(data).decode().replace("<", "\\u003c"),
        script="\n".join((files / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def _data(runs: Sequence[Run], found: Curves) -> dict[str, Any]:
    groups: list[list[dict[str, Any]]] = [[] for _ in runs]
    places: dict[int, int] = {}  # id of shared axes -> place among the run's groups
    drawn = []
    for chart in found.charts:
        content: dict[str, Any] = asdict(chart)
        content["lines"] = []
        for line in chart.lines:
            curve = found.found.get((line.run, line.key))
            if curve is None:
                continue
            if id(curve.at) not in places:
                places[id(curve.at)] = len(groups[line.run])
                groups[line.run].append({name: _short(values, digits=7) for name, values in curve.at.items()})
            own = asdict(line) | {"group": places[id(curve.at)]} | _points(curve)
            # Numbers of the run's cuts that interrupt it.
            own["cuts"] = [number for number, cut in enumerate(runs[line.run].cuts) if cut.breaks(line.key)]
            content["lines"].append(own)
        drawn.append(content)
    return {
        "modalities": modalities_of([run.history for run in runs]),
        "parts": TIME_PARTS,
        "charts": drawn,
        "runs": [
            {
                "name": run.name,
                "groups": groups[number] or [{name: [] for name in run.axes}],
                "timeline": run.timeline.as_json(),
                "layers": run.layers,
                "cuts": [{"step": cut.step, "text": cut.text} for cut in run.cuts],
            }
            for number, run in enumerate(runs)
        ],
    }


def _points(curve: Curve) -> dict[str, Any]:
    points: dict[str, Any] = {"mean": _short(curve.mean)}
    if not curve.exact:
        points |= {"low": _short(curve.low), "high": _short(curve.high)}
    if len(curve.broken):
        points["broken"] = curve.broken.tolist()
    if len(curve.gaps):
        points["gaps"] = curve.gaps.tolist()
    return points


def _short(values: Floats, *, digits: int = _DIGITS) -> list[float | int | None]:
    """Numbers with the digits that a chart can show; None if they are not finite."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
            continue
        short = float(f"{value:.{digits}g}")
        found.append(int(short) if short.is_integer() and abs(short) < 2**53 else short)
    return found


# --- the parts of the page that need no script ------------------------------------------------------------------------


def _headings(charts: Sequence[Chart], sections: Mapping[str, str]) -> list[str]:
    return ["Results", *_sections_of(charts), "Layers", *sections, "Timeline", "Configuration", "Environment"]


def _sections_of(charts: Sequence[Chart]) -> list[str]:
    return list(dict.fromkeys(chart.section for chart in charts))


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in heading.lower())


def _section(heading: str, content: str) -> str:
    return f'<h2 id="{_anchor(heading)}">{escape(heading)}</h2>\n{content}'


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs; a colour is a run"
    run = runs[0]
    model = run.settings
    words = [str(run.path)]
    if model:
        kind, layers, width = (
            model.get("model.kind"),
            model.get("model.num_layers"),
            model.get("model.hidden_size"),
        )
        words.append(f"{kind}, {layers} layers, width {width}")
    start = next((event for event in run.events if event.get("event") in BEGINS), {})
    if "world_size" in start:
        words.append(numbered(start["world_size"], "rank"))
    return " · ".join(words)


def _notes(runs: Sequence[Run]) -> str:
    histories, settings = {run.name: run.history for run in runs}, {run.name: run.settings for run in runs}
    found = facts.notes({run.name: run.path for run in runs}, histories, settings)
    found += [f"{run.name}: {line}." for run in runs for line in leaks_in(run.events)]
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in found)}</ul>' if found else ""


def _overview(runs: Sequence[Run]) -> list[str]:
    whole = len(runs) > 1 and any(run.parts.partial(run.history) for run in runs)
    routed = any(run.history.routes for run in runs)  # a row is of all runs, as in `compare`
    found = {
        run.name: facts.results(
            run.history,
            timeline=run.timeline,
            events=run.events,
            since=functools.partial(_comparable_since, run),
            parts=run.parts,
            whole=whole,
            routed=routed,
        )
        for run in runs
    }
    if len(runs) > 1:
        return [_section("Results", _table(found))]
    (run,), (values,) = runs, found.values()
    cards = "".join(_card(name, value) for name, value in values.items() if not name.startswith("loss"))
    return [
        _section("Results", f'<div class="cards">{cards}</div>{_table(facts.losses(run.history, parts=run.parts))}')
    ]


def _card(name: str, value: str) -> str:
    """A card: the number in one line; what follows it (`at step 100`, `guessing 10.0%`) is in small type."""
    number, _, rest = value.partition(" ")
    label = f"{name}, {rest}" if rest else name
    return f'<div class="card"><b>{escape(number.rstrip(","))}</b><span>{escape(label)}</span></div>'


def _comparable_since(run: Run, key: str) -> int:
    return max((cut.step for cut in run.cuts if cut.breaks(key)), default=0)


def _chart_sections(charts: Sequence[Chart]) -> list[str]:
    return [
        _section(name, f'<div class="charts" data-section="{escape(name)}"></div>') for name in _sections_of(charts)
    ]


def _layers_section() -> str:
    return _section("Layers", '<div class="stack" id="layer-maps"></div>')


def _timeline_section(runs: Sequence[Run]) -> str:
    rows, number = [], 0
    for run in runs:
        unusual = [one for one in run.timeline.events if not one.routine]
        number += len(unusual)
        for one in unusual[-_EVENTS_SHOWN:]:
            step = "" if one.step is None else f"{one.step:,}"
            cells = (run.name, f"{one.hours:.3f} h", str(one.attempt), step, one.event, one.text)
            rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("run", "time", "attempt", "step", "event", ""))
    table = f'<table class="words"><thead><tr>{head}</tr></thead>{"".join(rows)}</table>'
    said = numbered(number, "event that is not routine", "events that are not routine")
    if len(rows) < number:
        said += f"; the last {_EVENTS_SHOWN}{' of each run' if len(runs) > 1 else ''}"
    listed = f"<details><summary>{said}</summary>{table}</details>" if rows else ""
    return _section("Timeline", f'<div class="charts" id="timelines"></div>{listed}')


def _configuration(runs: Sequence[Run]) -> str:
    known = {run.name: run.settings for run in runs}
    parts = []
    if len(runs) > 1 and all(known.values()):
        different = facts.differences(list(known.values()))
        if different:
            values = {
                name: {key: _word(found[number]) for key, found in different} for number, name in enumerate(known)
            }
            parts.append(f"<p>Settings that differ:</p>{_table(values)}")
        else:
            parts.append("<p>All runs have the same settings.</p>")
    for run in runs:
        changed = facts.changes(run.path)
        if changed:
            rows = "".join(
                f"<tr><td>{attempt}</td><td>{escape(key)}</td><td>{escape(_word(old))}</td><td>{escape(_word(new))}</td></tr>"
                for attempt, key, old, new in changed
            )
            head = "<thead><tr><th>attempt</th><th>setting</th><th>before</th><th>from then on</th></tr></thead>"
            parts.append(f'<p>Changed within {escape(run.name)}:</p><table class="words">{head}{rows}</table>')
        parts.append(_pairs(f"All settings of {run.name}", _as_prepared(known[run.name], run.events)))
    return _section("Configuration", "\n".join(parts))


def _as_prepared(settings: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a run; where its data was prepared with other ones, with these."""
    path, others = preparation_in(events)
    own = {key: f"{_word(settings.get(key))}; {path} was prepared with {value}" for key, value in others.items()}
    return {**settings, **own} if settings else {}


def _environment(runs: Sequence[Run]) -> str:
    known = {run.name: facts.environment(run.path) for run in runs}
    parts = []
    if len(runs) > 1 and all(known.values()):
        different = [(key, found) for key, found in facts.differences(list(known.values())) if key != "git.diff"]
        values = {name: {key: _word(found[n]) for key, found in different} for n, name in enumerate(known)}
        parts.append(f"<p>What differs:</p>{_table(values)}" if different else "<p>The same for all runs.</p>")
    for name, values_of in known.items():
        diff = values_of.pop("git.diff", None)
        parts.append(_pairs(f"Environment of {name}", values_of))
        if diff:
            parts.append(
                f"<details><summary>Uncommitted changes of {escape(name)}</summary><pre>{escape(diff)}</pre></details>"
            )
    return _section("Environment", "\n".join(parts))


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return f'<p class="sub">{escape(title)}: not written, or not readable.</p>'
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(_word(value))}</td></tr>" for key, value in values.items())
    table = f'<div class="table"><table class="words">{rows}</table></div>'
    return f"<details><summary>{escape(title)}</summary>{table}</details>"


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return orjson.dumps(value).decode() if isinstance(value, dict | list) else str(value)


def _table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by name, a column for each run."""
    rows = list(dict.fromkeys(row for values in columns.values() for row in values))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(_row(row, [values.get(row, "-") for values in columns.values()]) for row in rows)
    return f'<div class="table"><table><thead><tr><th></th>{head}</tr></thead>\n{body}</table></div>'


def _row(name: str, values: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f"<tr><th>{escape(name)}</th>{cells}</tr>\n"
