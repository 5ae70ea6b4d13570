"""Commands that check a configuration and explain settings.

`mmscale config check` and `mmscale config explain`: print the results of config/load.py and config/explain.py. No
checks and no torch here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mmscale.cli.arguments import ConfigFile, Overrides
from mmscale.cli.output import Json, console, emit, pairs

app = typer.Typer(help="Check a configuration and explain its settings.", no_args_is_help=True)


@app.command("check", epilog="Example: mmscale config check configs/quickstart.yaml parallel.tp=2")
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check a configuration strictly; print every setting and the origin of its value."""
    from mmscale.config import load as loading
    from mmscale.config.notes import notes as notes_of

    loaded = loading.load(config, overrides or ())
    values, sources = loading.flatten(loaded), loading.origins(config, overrides or ())
    notes = notes_of(loaded)
    result = {
        "config": loaded.model_dump(mode="json"),
        "origins": sources,
        "digest": loading.digest(loaded),
        "notes": notes,
    }
    emit(result, as_json=as_json, text=lambda: _settings(values, sources, notes))


def _settings(values: dict[str, Any], sources: dict[str, str], notes: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("setting", "value", "from"):
        table.add_column(column)
    for key, value in values.items():
        source = sources.get(key, "default")
        style = "dim" if source == "default" else ""
        shown = value if isinstance(value, str) else json.dumps(value)
        table.add_row(Text(key, style), Text(shown, style), Text(source, style))
    console().print(table)
    for note in notes:
        console().print(Text(f"note: {note}"))


@app.command("explain", epilog="Example: mmscale config explain train.global_batch_size")
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False, help="Dotted key; default: list all.")] = "",
    as_json: Json = False,
) -> None:
    """Explain one setting: type, unit, default, meaning, source."""
    from mmscale.config import explain as explaining

    entry = explaining.explain(key)
    emit(entry, as_json=as_json, text=lambda: _entry(entry, explaining.explain))


def _entry(entry: dict[str, Any], explain_key: Any) -> None:
    if "type" in entry:
        shown = {"": entry["meaning"], "wants": entry["type"], "unit": entry["unit"], "source": entry["source"]}
        rows = [(name, value) for name, value in shown.items() if value]
        rows.insert(2, ("default", "none, it is required" if entry["required"] else json.dumps(entry["default"])))
        pairs(((name or entry["key"], value) for name, value in rows))
    else:
        pairs([(entry["key"] or "mmscale", entry["meaning"])])
    if entry.get("keys"):
        pairs((f"  {name}", explain_key(name)["meaning"]) for name in entry["keys"])
