# python docs/measurements/routing.py collect runs docs/measurements/routing.json
# python docs/measurements/routing.py draw docs/measurements/routing.json docs/routing.png
"""Curves of the runs that docs/routing.md compares: run folders to one file, and that to a figure and a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

SETS = ("half_text", "quickstart", "emoji")
WAYS = {
    "sequence-nominal-sigmoid": "tab:blue",
    "sequence-actual-sigmoid": "tab:cyan",
    "micro_batch-nominal-sigmoid": "tab:orange",
    "micro_batch-actual-sigmoid": "tab:olive",
    "micro_batch-nominal-competitive": "tab:red",
    "micro_batch-nominal-softmax": "tab:purple",
}


def collect(runs: Path, out: Path) -> None:
    """Held-out losses and unrouted shares of every run `<set>-<scope>-<capacity>-<choice>-<seed>`."""
    found = {}
    for folder in sorted(runs.iterdir()):
        name = folder.name
        finished = (folder / "events.jsonl").exists() and '"finish"' in (folder / "events.jsonl").read_text()
        if not finished or not name.startswith(SETS):
            continue
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        entry: dict[str, Any] = {
            "held_out": [
                [row["step"], *(round(row[f"eval/{key}"], 4) for key in ("loss", "loss/text", "loss/image"))]
                for row in rows
                if "eval/loss" in row
            ],
            "unrouted": [
                [row["step"], *(round(row[f"experts/{name}/unrouted_fraction"], 3) for name in ("text", "image"))]
                for row in rows
                if "experts/text/unrouted_fraction" in row
            ],
        }
        report = folder / "auxiliary" / "report.json"
        if report.exists():
            losses = json.loads(report.read_text())["held_out"]
            entry["causal"] = round(losses["causal"]["loss"], 4)
            entry["batch"] = round(losses["batch"]["loss"], 4)
        found[name] = entry
    out.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def seeds(found: dict[str, Any], name: str, way: str) -> list[dict[str, Any]]:
    """The runs of a way on a set, by seed."""
    return [found[key] for key in sorted(found) if key.rsplit("-", 1)[0] == f"{name}-{way}"]


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/routing.md: last held-out loss, unrouted share of the last quarter, causal loss."""
    lines = []
    for name in SETS:
        for way in WAYS:
            runs = seeds(found, name, way)
            if not runs:
                continue
            losses = [run["held_out"][-1][1] for run in runs]
            shares = [run["unrouted"] for run in runs if run["unrouted"]]  # of some runs the last losses alone are kept
            late = [[row for row in share if row[0] > 0.75 * share[-1][0]] for share in shares]
            text, image = (mean(row[column] for rows in late for row in rows) for column in (1, 2))
            causal = [run["causal"] for run in runs if "causal" in run]
            cells = [
                name,
                *way.split("-"),
                f"{text:.0%}, {image:.0%}",
                _spread(losses),
                _spread(causal) if causal else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def draw(file: Path, out: Path) -> None:
    """Unrouted shares and held-out losses along the runs, mean over seeds with their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    found = json.loads(file.read_text())
    names = [name for name in SETS if any(seeds(found, name, way) for way in WAYS)]
    figure, axes = plt.subplots(3, len(names), figsize=(4.2 * len(names), 9), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        for way, colour in WAYS.items():
            runs = [run for run in seeds(found, name, way) if run["unrouted"]]
            if not runs:
                continue
            for row, (key, index) in enumerate((("unrouted", 1), ("unrouted", 2), ("held_out", 1))):
                curves = np.array([[entry[index] for entry in run[key]] for run in runs])
                steps = [entry[0] for entry in runs[0][key]]
                axes[row][column].plot(steps, curves.mean(axis=0), color=colour, label=way.replace("-", ", "))
                axes[row][column].fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15)
        axes[0][column].set_title(name)
        axes[2][column].set_xlabel("step")
        for row, limit in enumerate((1, 1, None)):
            axes[row][column].set_ylim(bottom=0 if limit else None, top=limit)
        low = min(min(entry[1] for entry in run["held_out"]) for way in WAYS for run in seeds(found, name, way))
        axes[2][column].set_ylim(low - 0.02, low + 0.6)
    for row, label in enumerate(
        ("text tokens without an expert", "image tokens without an expert", "held-out loss [nats]")
    ):
        axes[row][0].set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    if sys.argv[1] == "collect":
        collect(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        draw(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.stdout.write("\n".join(table(json.loads(Path(sys.argv[2]).read_text()))) + "\n")
