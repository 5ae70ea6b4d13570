"""Text of a plan, for a terminal or a file.

Computes nothing and prints nothing itself.
"""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LAYOUT_ROWS = 8
_REFUSED_ROWS = 3


def short(number: float) -> str:
    """A number with three digits and a decimal unit: 7113100000 -> "7.11 G"."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def render(summary: dict[str, Any], *, width: int = 120, color: bool = False) -> str:
    """Text of what `plan` returned.

    Args:
        summary: the return value of `plan`.
        width: columns.
        color: with terminal escapes.
    """
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, highlight=False)
    console.print(_model(summary))
    console.print(_layouts(summary))
    hidden = summary["layouts_possible"] - min(_LAYOUT_ROWS, len(summary["layouts"]))
    if hidden > 0:
        console.print(f"{hidden} more layouts are possible")
    for cause, count in list(summary["refused"].items())[:_REFUSED_ROWS]:
        console.print(f"refused {count}: {cause}", markup=False)
    for line in summary["assumptions"]:
        console.print(f"- {line}", markup=False)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _model(summary: dict[str, Any]) -> Table:
    parameters, flops = summary["parameters"], summary["flops_per_token"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("parameters", f"{short(parameters['total'])} total, {short(parameters['active'])} active per token")
    groups = {
        name: value for name, value in parameters.items() if isinstance(value, int) and name not in ("total", "active")
    }
    table.add_row("", ", ".join(f"{name.replace('_', ' ')} {short(value)}" for name, value in groups.items() if value))
    if parameters["per_modality"]:
        table.add_row(
            "per modality", ", ".join(f"{name} {short(value)}" for name, value in parameters["per_modality"].items())
        )
    table.add_row("FLOPs per token", f"{short(flops['forward'])} forward, {short(flops['training'])} training")
    table.add_row("tokens", f"{short(summary['tokens_per_step'])} per step, {short(summary['tokens'])} in all")
    table.add_row("training", f"{summary['training_flops']:.3g} FLOPs")
    table.add_row("checkpoint", f"{short(summary['checkpoint_bytes'])}B")
    return table


def _layouts(summary: dict[str, Any]) -> Table:
    memory = summary["gpu_memory_gib"]
    title = f"layouts on {summary['gpus']} ranks" + (f" of {memory:g} GiB" if memory is not None else "")
    table = Table(title=title, title_justify="left")
    for column in ("", "tp", "pp", "vpp", "ep", "dp", "recompute", "GiB", "cost"):
        table.add_column(column, justify="right")
    table.add_column("why")
    best = summary["layouts"][0]["cost"]["total"] if summary["layouts"] else 1.0
    for place, layout in enumerate(summary["layouts"][:_LAYOUT_ROWS], start=1):
        cells = [layout[key] for key in ("tp", "pp", "vpp", "ep", "dp", "recompute")]
        table.add_row(
            f"{place}{' *' if layout['current'] else ''}",
            *("-" if cell is None else str(cell) for cell in cells),
            f"{layout['memory']['total_gib']:.1f}",
            f"{layout['cost']['total'] / best:.2f}",
            "; ".join(layout["reasons"]),
        )
    return table
