"""Pages of the reference that are generated from the code: settings, commands, choices. A hook of mkdocs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer.main

from mmscale.cli import app
from mmscale.cli.bench import BenchCommand
from mmscale.config.explain import explain
from mmscale.tables import settings as tables
from mmscale.tables.plugins import PLUGINS
from mmscale.tables.routings import ROUTINGS
from mmscale.tables.table import Table


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in (("settings", settings()), ("commands", commands()), ("choices", choices())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def settings() -> str:
    """A table per section: type, unit, default, meaning and source of every setting."""
    lines = [
        "# Settings",
        "",
        "This page lists every key of a configuration file. On the command line, write `mmscale train CONFIG "
        "key=value`.",
        "`mmscale config check CONFIG` prints the resolved configuration and the source of each value.",
        "`mmscale config explain KEY` prints the entry of one setting.",
    ]
    entries = [explain(key) for key in explain()["keys"]]
    sections = {entry["key"]: entry["meaning"] for entry in entries if "type" not in entry}
    tables: dict[str, list[str]] = {}
    for entry in (entry for entry in entries if "type" in entry):
        section = max((name for name in sections if entry["key"].startswith(f"{name}.")), key=len, default="")
        tables.setdefault(section, []).append("| " + " | ".join(_cells(entry)) + " |")
    for section, rows in tables.items():
        lines += ["", f"## {section or 'Top level'}", "", sections.get(section, ""), ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any]) -> Iterator[str]:
    allowed = entry["allowed"]
    kind = (
        ", ".join(f"`{value}`" for value in allowed) if allowed and not isinstance(allowed[0], bool) else entry["type"]
    )
    default = "required" if entry["required"] else f"`{json.dumps(entry['default'], ensure_ascii=False)}`"
    unit, source = entry["unit"], entry["source"]
    meaning = entry["meaning"] + (f" Unit: {unit}." if unit else "") + (f" Source: {source}." if source else "")
    return (_escaped(text) for text in (f"`{entry['key']}`", kind, default, meaning))


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def choices() -> str:
    """A table for each enumeration: names and meanings; and the kinds of plug-ins."""
    lines = ["# Choices", "", "This page lists the values that settings take by name, and the kinds of plug-ins."]
    for table in (*(one for one in vars(tables).values() if isinstance(one, Table)), ROUTINGS):
        keys = ", ".join(f"`{key}`" for key in table.settings)
        lines += ["", f"## {table.title}", "", *([f"Values of {keys}.", ""] if keys else [])]
        lines += ["| name | meaning |", "| --- | --- |"]
        lines += [f"| `{name}` | {_escaped(choice.meaning)} |" for name, choice in table.items()]
    lines += ["", f"## {PLUGINS.title}", "", "| kind | settings | what it decides | its factory gets | its methods |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, kind in PLUGINS.items():
        cells = [*(", ".join(f"`{one}`" for one in words) for words in (kind.settings, kind.given, kind.methods))]
        lines.append(f"| {name} | {cells[0]} | {_escaped(kind.meaning)} | {cells[1] or 'nothing'} | {cells[2]} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its help, arguments, options and example."""
    root = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Every command has `--help`; most have `--json`. Before the command, `mmscale` takes:",
        "",
    ]
    lines += ["| option | meaning |", "| --- | --- |"]
    lines += [row for row in (_row(one, root.context_class(root)) for one in root.params) if row]
    for path, command in _walk(root, ("mmscale",)):
        lines += _page(path, command)
    return "\n".join(lines) + "\n"


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):  # a group; typer may bring a click of its own, so no class is named here
        for name, child in command.commands.items():
            if not child.hidden:
                yield from _walk(child, (*path, name))
    else:
        yield path, command


def _page(path: tuple[str, ...], command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=" ".join(path))
    yield from (
        "",
        f"## {' '.join(path[1:])}",
        "",
        f"`{' '.join([*path, *command.collect_usage_pieces(context)])}`",
        "",
    )
    yield from (_escaped(part) + "\n" for part in (command.help or "").split("\n\n"))
    if command.epilog:
        yield from ("", f"`{command.epilog.removeprefix('Example: ')}`")
    rows = [row for row in (_row(parameter, context) for parameter in command.params) if row]
    if isinstance(command, BenchCommand):
        rows = [f"| `{option}` | {_escaped(meaning)} |" for option, meaning in command.options().items()] + rows
    if rows:
        yield from ("", "| argument or option | meaning |", "| --- | --- |", *rows)


def _row(parameter: Any, context: Any) -> str:
    record = (
        None if getattr(parameter, "hidden", False) or parameter.name == "help" else parameter.get_help_record(context)
    )
    return f"| `{' '.join(record[0].split())}` | {_escaped(record[1])} |" if record else ""
