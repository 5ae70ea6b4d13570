"""Text of a plan, for a terminal or a file.

It computes and prints nothing.
"""

from __future__ import annotations

import io
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmscale.wording import duration, numbered

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LAYOUT_ROWS = 8
_REJECTED_ROWS = 5
_BAR = 40
# Width that the table of layouts needs for a column with reasons.
_WIDE = 110
_MEMORY = (
    ("parameters", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("other", "activations"),
    ("expert_choice", "expert choice"),
    ("depth", "Mixture-of-Depths"),
    ("peak", "logits, layer at work or Muon"),
    ("communication", "communication"),
)
_TIME = (
    ("products", "matrix products"),
    ("attention", "attention"),
    ("elementwise", "element-wise"),
    ("recompute", "recompute"),
    ("tp", "TP and SP messages"),
    ("cp", "CP messages"),
    ("ep", "EP messages"),
    ("pp", "PP messages"),
    ("bubble", "pipeline bubble"),
    ("dp", "DP messages not hidden"),
    ("optimizer", "optimizer"),
)
_SENT = (
    ("tp", "TP"),
    ("sp", "SP"),
    ("cp", "CP"),
    ("ep", "EP"),
    ("pp", "PP"),
    ("grad_reduce", "gradients"),
    ("param_gather", "parameters"),
    ("muon", "Muon"),
)


def short(number: float) -> str:
    """A number with three digits and a metric prefix: 7113100000 -> "7.11 G"."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _fixed(number: float) -> str:
    """Three digits without an exponent: 1714.8 -> "1,715"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def render(summary: dict[str, Any], *, width: int = 120, color: bool = False) -> str:
    """Text for the result of `plan`.

    Args:
        summary: the return value of `plan`.
        width: columns.
        color: with terminal escapes.
    """
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, highlight=False)
    if summary["gpu_by_default"]:
        console.print(
            f"for {summary['gpu']}, the default of --gpu; --gpu FILE.json of `mmscale bench calibrate` plans for a "
            "machine that was measured\n",
            markup=False,
        )
    console.print(_model(summary))
    console.print()
    if summary["layouts"]:
        for part in _layouts(summary, wide=width >= _WIDE):
            console.print(part)
        console.print(_counts(summary), markup=False, style="dim")
        console.print()
        console.print(_best(summary["layouts"][0]))
    else:
        console.print(f"no layout of {numbered(summary['gpus'], 'rank')} is possible", style="bold red")
    if summary["own_layout_refused"]:
        console.print(f"the configuration's own layout is refused: {summary['own_layout_refused']}", markup=False)
    if summary["rejected"]:
        console.print()
        console.print(_rejected(summary["rejected"]))
    console.print()
    console.print(_cluster(summary["cluster"]))
    console.print()
    console.print(_sweep(summary["step_law"]))
    console.print("\nassumptions", style="bold")
    for line in summary["assumptions"]:
        console.print(f"- {line}", markup=False, style="dim")
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _pairs(title: str | None = None) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True, style="cyan")
    return table


def _model(summary: dict[str, Any]) -> Table:
    model, parameters, flops = summary["model"], summary["parameters"], summary["flops_per_token"]
    table = _pairs()
    experts = " + ".join(f"{count} {name}" for name, count in model["experts"].items())
    table.add_row(
        "model",
        f"{model['name']}: {model['kind']}, {numbered(model['num_layers'], 'layer')} x {model['hidden_size']}"
        + (f" ({model['depth_layers']} with Mixture-of-Depths)" if model["depth_layers"] else "")
        + (f", experts {experts}" if experts else "")
        + f", sequences of {model['seq_length']}",
    )
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
    parts = {name: value for name, value in flops.items() if name not in ("forward", "training") and value}
    table.add_row("", ", ".join(f"{name} {value / flops['forward']:.1%}" for name, value in parts.items()))
    table.add_row("tokens", f"{short(summary['tokens_per_step'])} per step, {short(summary['tokens'])} in all")
    table.add_row("training", f"{summary['training_flops']:.3g} FLOPs{_duration(summary)}")
    table.add_row("checkpoint", f"{short(summary['checkpoint_bytes'])}B")
    return table


def _duration(summary: dict[str, Any]) -> str:
    found = summary["duration"]
    if found is None:
        return ""
    hours = found["gpu_hours"] / summary["gpus"]
    time = (
        f"{found['days']:.3g} days" if hours >= 48 else f"{hours:.3g} hours" if hours >= 2 else duration(3600 * hours)
    )
    return f", {time} on {summary['gpus']:,} x {summary['gpu']} = {short(found['gpu_hours'])} GPU-hours"


def _layouts(summary: dict[str, Any], *, wide: bool) -> list[Table]:
    """The table of layouts. Reasons are in the last column, or in a separate list if lines are short."""
    memory = summary["gpu_memory_gib"]
    title = f"layouts on {numbered(summary['gpus'], 'rank')}" + (f" of {memory:g} GiB" if memory is not None else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=HEAVY_HEAD if wide else None)
    why = _pairs("why")
    entries = summary["layouts"]
    context = ("cp",) if any(entry["cp"] > 1 for entry in entries) else ()
    sizes = ("tp", "pp", "vpp", *context, "ep", "dp")
    for column in ("", *sizes, "mb", "recompute", "GiB", "s/step", "tokens/s", "MFU"):
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("why")
    contexts = {entry["cp"]: entry for entry in reversed(entries)}  # the fastest layout of each
    shown = [
        entry
        for place, entry in enumerate(entries)
        if place < _LAYOUT_ROWS or entry["current"] or entry is contexts[entry["cp"]]
    ]
    for layout in shown:
        cells = [layout[key] for key in (*sizes, "micro_batch_size")]
        cells.append("+".join(layout["recompute_modules"]) or layout["recompute"])
        style = "red" if layout["fits"] is False else "green" if layout is entries[0] else None
        place, reasons = f"{entries.index(layout) + 1}{' *' if layout['current'] else ''}", "; ".join(layout["reasons"])
        why.add_row(place, reasons)
        table.add_row(
            place,
            *("-" if cell is None else str(cell) for cell in cells),
            _fixed(layout["memory"]["total_gib"]),
            _fixed(layout["cost"]["total"]),
            short(layout["tokens_per_second"]),
            f"{layout['mfu']:.0%}",
            *([reasons] if wide else []),
            style=style,
        )
    return [table] if wide else [table, why]


def _counts(summary: dict[str, Any]) -> str:
    tried, possible = summary["layouts_tried"], summary["layouts_possible"]
    if tried == 1:
        return "* the configuration's own layout, on as few ranks as it needs; --gpus N tries others"
    shown = "the fastest of each tp x pp x cp x ep" if possible else "the ones that come nearest"
    return f"* the configuration's own; {tried:,} candidates tried, {possible:,} possible; shown: {shown}"


def _best(layout: dict[str, Any]) -> Table:
    """The parts of memory, time and messages of the first layout."""
    memory, time = layout["memory"], layout["time_s"]
    parts = {name: memory.get(f"{name}_gib", 0.0) for name, _ in _MEMORY}
    parts["other"] = memory["activations_gib"] - memory["expert_choice_gib"] - memory["depth_gib"]
    muon = memory["update_gib"] - memory["activations_gib"]  # activations are freed before the update
    parts["peak"] = max(memory["logits_gib"], memory["working_gib"], muon)
    table = _pairs("the first layout")
    table.add_row("parameters", f"{short(layout['parameters_per_rank'])} on the fullest rank")
    unit, scale = ("GiB", 1.0) if memory["total_gib"] >= 1 else ("MiB", 1024.0)
    held = f"memory, {_fixed(scale * memory['total_gib'])} {unit}"
    _bars(table, held, unit, [(label, scale * parts[name]) for name, label in _MEMORY])
    _bars(
        table,
        f"step, {_fixed(1e3 * time['total'])} ms",
        "ms",
        [(label, 1e3 * time[name]) for name, label in _TIME],
        "cyan",
    )
    sent = layout["communication_bytes"]
    total = sum(sent.values())
    words = ", ".join(f"{label} {short(sent[name])}B" for name, label in _SENT if sent[name])
    table.add_row(f"sent per rank, {short(total)}B" if total else "sent per rank", words or "nothing")
    return table


def _bars(table: Table, title: str, unit: str, parts: list[tuple[str, float]], style: str = "green") -> None:
    """A bar for each part that is not zero."""
    total = sum(value for _, value in parts) or 1.0
    for place, (label, value) in enumerate((label, value) for label, value in parts if value > 0):
        # The first row is the total.
        bar = Text("█" * round(_BAR * value / total) or "▏", style=style)
        table.add_row(title if place == 0 else "", Text.assemble(f"{_fixed(value):>9} {unit}  ", bar, f" {label}"))


def _rejected(rejected: list[dict[str, Any]]) -> Table:
    table = Table(title="rejected, by first failing rule", title_justify="left", title_style="bold")
    table.add_column("candidates", justify="right")
    table.add_column("rule, in the words of the example")
    table.add_column("example")
    for entry in rejected[:_REJECTED_ROWS]:
        example = entry["example"]
        sizes = {key: example[key] for key in ("tp", "pp", "vpp", "ep", "cp", "dp") if key != "cp" or example[key] > 1}
        place = " ".join(f"{key}{size}" for key, size in sizes.items() if size is not None)
        details = f"{place} mb{example['micro_batch_size']}"
        if example["recompute"] != "none":
            details += f" {example['recompute']}"
        table.add_row(f"{entry['count']:,}", entry["cause"], details)
    if len(rejected) > _REJECTED_ROWS:
        table.add_row(f"{sum(entry['count'] for entry in rejected[_REJECTED_ROWS:]):,}", "other rules", "")
    return table


def _cluster(load: dict[str, Any]) -> Table:
    place = f"{numbered(load['ranks'], 'rank')} on {numbered(load['nodes'], 'node')}"
    table = _pairs(f"load on file system and scheduler from {place}")
    table.add_row(
        "checkpoint",
        f"{load['checkpoint_files']:,} files, {short(load['checkpoint_bytes'])}B, the largest "
        f"{short(load['largest_file_bytes'])}B; {_fixed(load['checkpoint_s'])} s at {load['storage_gb_s']:g} GB/s",
    )
    table.add_row(
        "start",
        f"{load['launch_files']} files of the launch, {load['log_files']:,} logs; {load['start_files_per_node']:,} "
        f"files read by each node; {short(load['start_opens'])} opens, {short(load['start_looks'])} stat calls; "
        f"{load['scheduler_per_start']} requests to SLURM",
    )
    table.add_row("resume", f"{short(load['start_read_bytes'])}B read")
    table.add_row(
        "training",
        f"{_fixed(load['metadata_per_s'])} stat calls on small files a second; {load['scheduler_per_hour']} requests "
        f"to SLURM an hour, {load['scheduler_per_viewer_hour']} for each person who watches",
    )
    return table


def _sweep(law: dict[str, Any]) -> Table:
    table = _pairs("centre of a sweep (Step Law, arXiv 2503.04715)")
    table.add_row("learning rate", f"{law['lr']:.2g}")
    table.add_row("batch", f"{short(law['batch_tokens'])} tokens = {law['batch_sequences']:,} sequences")
    for caveat in law["caveats"]:
        table.add_row("", Text(f"but {caveat}", style="dim"))
    return table
