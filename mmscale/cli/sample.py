# `mmscale sample`: draws images for prompts. Drawing is inference/'s.
# Imports torch only when it runs.
"""Command that samples from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.output import Json, emit
from mmscale.cli.train import split_step


def sample(
    run: Annotated[
        str, typer.Argument(metavar="RUN[@STEP]", help="Run folder; newest checkpoint unless a step is named.")
    ],
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="Text before the image; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for PNG files.")] = Path("samples"),
    count: Annotated[int, typer.Option("--count", min=1, help="Images per prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the most likely code.")] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Probability of the codes to choose from.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw images for text prompts, with batch routing; one PNG each and one with all of them."""
    folder, step = split_step(run)
    from mmscale.data.image_files import save_png
    from mmscale.inference.draw import draw
    from mmscale.inference.model import open_run
    from mmscale.report.figures import sample_rows

    with open_run(folder, step=step) as model:
        drawings = draw(model, prompt, count=count, temperature=temperature, top_p=top_p, seed=seed)
        reached = model.step
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, drawing in enumerate(drawings):
        for index, image in enumerate(drawing.images):
            file = out / f"{number:02d}_{index}.png"
            save_png(image, file)
            files.append(str(file))
    sheet = out / "samples.png"
    sample_rows([(drawing.prompt, drawing.images) for drawing in drawings], sheet)
    result = {"run": str(folder), "step": reached, "routing": "batch", "sheet": str(sheet), "images": files}
    emit(
        result,
        as_json=as_json,
        text=lambda: typer.echo(f"drew {len(files)} images with batch routing, all of them in {sheet}"),
    )
