"""Commands that fit scaling laws.

`mmscale scaling fit`: fits the mixed-modal scaling law to runs. report/scaling*.py compute it. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from mmscale.cli.output import Json, emit
from mmscale.errors import UsageError

app = typer.Typer(help="Fit scaling laws to runs.", no_args_is_help=True)
_VIEWS = ("causal", "held_out")
_SIZES = ("active", "total")


@app.command("fit", epilog="Example: mmscale scaling fit runs/text_* runs/image_* runs/both_* --out scaling.png")
def fit(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders: of each modality alone, and of pairs.")
    ],
    view: Annotated[
        str, typer.Option("--view", help=f"Routing of the held-out losses: {', '.join(_VIEWS)} (batch routing).")
    ] = "causal",
    parameters: Annotated[
        str,
        typer.Option("--parameters", help="Meaning of N: parameters that are active for an average token, or total."),
    ] = "active",
    at: Annotated[
        str,
        typer.Option(
            "--at",
            metavar="TOKENS",
            show_default=False,
            help="Numbers of tokens at which the competition barrier is predicted, e.g. 1e9,45.1e9.",
        ),
    ] = "",
    least_share: Annotated[
        float,
        typer.Option(
            "--least-share",
            min=0.0,
            max=0.5,
            help="Smallest share of the tokens with which a modality counts as part of a run.",
        ),
    ] = 0.1,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Number of fits to resampled residuals.")] = 200,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", show_default=False, help="Draw fit and barrier: a .png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit the additive mixed-modal law, and predict the size from which modalities help each other."""
    if view not in _VIEWS:
        raise UsageError(f"--view {view!r} is not a loss of a run", remedy=f"choose {', '.join(_VIEWS)}")
    if parameters not in _SIZES:
        raise UsageError(f"--parameters {parameters!r} is not a size", remedy=f"choose {', '.join(_SIZES)}")
    tokens = _tokens(at)
    if out is not None and out.suffix != ".png":
        raise UsageError(f"--out {out}: the picture is a .png", remedy="write --out scaling.png")
    from mmscale.report import figure_style, scaling, scaling_runs, scaling_view
    from mmscale.report.run_losses import View

    points = scaling_runs.read_points(
        runs, view=cast(View, view), size=cast(scaling_runs.Size, parameters), least_share=least_share
    )
    seen = scaling_runs.observations(points)
    found = scaling.fit(seen, replicas=bootstrap)
    if out is not None:
        figure_style.save_figure(scaling_view.picture(found, seen), out)
    result = scaling_view.summary(found, seen, tokens=tokens)
    emit(result, as_json=as_json, text=lambda: typer.echo(scaling_view.render(result)))


def _tokens(text: str) -> tuple[float, ...]:
    try:
        tokens = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        tokens = (0.0,)
    if not all(count > 0 for count in tokens):
        raise UsageError(f"--at {text!r}: needs numbers of tokens", remedy="write e.g. --at 1e9,45.1e9")
    return tokens
