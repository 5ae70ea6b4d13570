"""Output of commands. Results go to stdout, everything else to stderr.

Printing: tables for people, one JSON object for scripts, two lines for an error. Independent of commands. Importing it
is cheap: rich is imported with the first table.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.errors import MmscaleError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def emit(result: Any, *, as_json: bool, text: Callable[[], None]) -> None:
    """Print the result of a command.

    Args:
        result: The object that `--json` prints.
        as_json: Whether `--json` was given.
        text: Prints the same for people.
    """
    if as_json:
        typer.echo(json.dumps(_finite(result), default=str, allow_nan=False))
    else:
        text()


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become "nan", "inf" or "-inf", as in metrics.jsonl."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def console() -> Console:
    """Console on stdout, as wide as the terminal; without a terminal wide enough for whole lines."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def pairs(rows: Iterable[tuple[str, object]], *, title: str = "") -> None:
    """Print names and values in two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False, title=title or None, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(str(value)))
    console().print(table)


def size(number: int) -> str:
    """A number of bytes, e.g. "1.5 GiB"."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def show_error(error: MmscaleError) -> None:
    """`error: <cause>` and `  fix: <remedy>` on stderr; further lines of either are indented."""
    cause = error.cause.replace("\n", "\n  ")
    typer.echo(f"error: {cause}", err=True)
    if error.remedy:
        typer.echo(f"  fix: {error.remedy}".replace("\n", "\n       "), err=True)
