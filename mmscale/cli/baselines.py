"""The command that writes baselines for a configuration.

`mmscale baselines`: configuration files with equal FLOPs. plan/siblings.py computes them. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli.arguments import ConfigFile, Overrides
from mmscale.cli.output import Json, console, emit
from mmscale.errors import UsageError

if TYPE_CHECKING:
    from mmscale.plan.siblings import Sibling


def baselines(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the files.")] = Path("baselines"),
    experts: Annotated[
        int | None,
        typer.Option("--experts", min=1, show_default=False, help="Experts of each modality; default: CONFIG's, or 4."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            show_default=False,
            help="Largest difference of FLOPs per token, as a share; default: 0.01.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write configurations of equal FLOPs per token: dense, experts, untied, token choice, Mixture-of-Depths.

    Models: dense; 1t1i, moe8x, 4t4i (experts); mot, 4t4i_untied, mot_4t1i (untied weights); tc_* (token choice); mod_*
    (Mixture-of-Depths). An existing file with other contents is not replaced.
    """
    from mmscale.config.load import load
    from mmscale.plan.siblings import TOLERANCE, siblings, text_of

    loaded = load(config, overrides or ())
    tolerance = TOLERANCE if tolerance is None else tolerance
    found = siblings(loaded, experts=experts, tolerance=tolerance)
    files = {out / f"{sibling.config.run.name}.yaml": text_of(sibling, of=str(config)) for sibling in found}
    for file, text in files.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{file} exists and differs from the file to write", remedy="remove it, or give another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    entries = [{"file": str(file)} | sibling.as_dict() for file, sibling in zip(files, found, strict=True)]
    result = {"config": str(config), "tolerance": tolerance, "siblings": entries}
    emit(result, as_json=as_json, text=lambda: _table(found, list(files)))


def _table(found: list[Sibling], files: list[Path]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("file", "forward FLOPs per token", "of CONFIG's", "parameters", "changed"):
        table.add_column(column, no_wrap=column != "changed")
    for sibling, file in zip(found, files, strict=True):
        row: list[Any] = [file, f"{sibling.flops:,.0f}", f"{sibling.ratio:.4f}", f"{sibling.parameters:,}"]
        table.add_row(*(Text(str(cell)) for cell in row), Text("; ".join(sibling.changes) or "nothing"))
    console().print(table)
