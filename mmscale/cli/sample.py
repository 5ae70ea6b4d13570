# `mmscale sample`: text and images from a run or an exported folder. checkpoints_tools/generator.py generates; with
# batch routing mmscale/inference/draw.py draws. Imports torch only when it runs.
"""Command that samples from a model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.output import Json, emit
from mmscale.cli.train import split_step
from mmscale.errors import UsageError

if TYPE_CHECKING:
    from mmscale.inference.generate import Sampling
    from mmscale.runtime.rank_env import RankEnv

_ROUTINGS = ("causal", "top1", "threshold", "batch")
_BATCH = (
    "routing: batch: experts choose among whole sequences, so that only images are drawn, beside held-out documents"
)


@dataclass
class _Drawn:
    """What one prompt gave, in order: texts, and images uint8 [height, width, channels]."""

    prompt: str
    pieces: list[Any]
    tokens: int | None = None
    ended: bool | None = None


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|HF_DIR",
            help="Run folder (newest checkpoint unless a step is named), or a folder of `convert to-hf`.",
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt", metavar="TEXT", help="May be repeated. With --image, each <image> in it stands for one."
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="Image of every prompt, before its text; may be repeated."),
    ] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Begin an image after the prompt, whatever the model thinks.")
    ] = (False),
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            show_default="causal, or batch if a run has no auxiliary routers",
            help="Who chooses experts: causal, top1, threshold; batch draws images only.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for PNG files.")] = Path("samples"),
    count: Annotated[int, typer.Option("--count", min=1, help="Continuations of each prompt.")] = 4,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            show_default="what the context has room for",
            help="Tokens of the longest continuation.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Tokens to choose from; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Probability of the tokens to choose from.")
    ] = 1.0,
    guidance: Annotated[
        float, typer.Option("--guidance", min=0.0, help="Classifier-free guidance of images; 1: none.")
    ] = 1.0,
    recognise: Annotated[
        bool, typer.Option("--recognise", help="Digits: say how many are read as asked by a classifier of real ones.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    nproc: ranks.OnRanks = None,
    as_json: Json = False,
) -> None:
    """Continue prompts of text and images with text and images; PNG files, and one with all of them."""
    path, step = split_step(model)
    if routing is not None and routing not in _ROUTINGS:
        raise UsageError(f"--routing {routing!r} is not known", remedy=f"choose one of {', '.join(_ROUTINGS)}")
    if routing == "batch" and (path / "config.json").is_file():
        raise UsageError(
            "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
        )
    if (path / "config.json").is_file():
        ranks.refuse(nproc, "an export")
    if ranks.starts_ranks(nproc):
        raise typer.Exit(ranks.start_for_a_while(nproc))
    from mmscale.inference.generate import Sampling

    chosen, shared = Sampling(temperature, top_k, top_p, guidance, max_tokens, seed), ranks.shared(nproc)
    files = tuple(image or ())
    with contextlib.ExitStack() as stack:
        opened = None if routing == "batch" else _open(path, step, routing, shared, stack)
        if opened is None:
            only_batch = [
                ("--image", files),
                ("--top-k", top_k),
                ("--guidance", guidance != 1),
                ("--max-tokens", max_tokens),
            ]
            given = [name for name, value in only_batch if value]
            if given:
                raise UsageError(
                    f"{', '.join(given)}: not with batch routing, which draws images for texts only",
                    remedy="train auxiliary routers: `mmscale train CONFIG --stage auxiliary`, and use "
                    "--routing causal",
                )
            facts, drawn = _with_batch_routing(path, step, prompt, count, chosen, shared)
        else:
            facts, drawn = _continued(opened, path, prompt, files, draw, count, chosen)
    if shared is not None and not shared.is_first:
        return
    result = facts | _written(drawn, prompt, count, out)
    if recognise:
        result["recognition"] = _recognised(drawn)
    emit(result, as_json=as_json, text=lambda: _print(result))


def _open(
    path: Path, step: int | None, routing: str | None, shared: RankEnv | None, stack: contextlib.ExitStack
) -> Any:
    """A generator; None: nobody asked for a routing, and the run has batch routing only."""
    from checkpoints_tools.generator import open_generator, open_on_ranks
    from checkpoints_tools.to_hf import NoRoutersError

    try:
        if shared is not None:
            return stack.enter_context(open_on_ranks(path, step, routing=routing, env=shared))
        return open_generator(path, step, routing=routing)
    except NoRoutersError:
        if routing is not None:
            raise
        return None


def _continued(
    opened: Any, path: Path, prompts: list[str], files: tuple[Path, ...], draw: bool, count: int, sampling: Sampling
) -> tuple[dict[str, Any], list[_Drawn]]:
    import numpy as np

    from checkpoints_tools.generator import Prompt

    asked = [Prompt(text, files, draw) for text in prompts]
    found = opened.sample(asked, count=count, sampling=sampling)
    for line in opened.resized(asked[0]) if files else ():
        typer.echo(f"note: {line}", err=True)
    drawn = [
        _Drawn(
            one.prompt.text,
            [piece if isinstance(piece, str) else np.asarray(piece) for piece in one.pieces],
            len(one.ids),
            one.ended,
        )
        for one in found
    ]
    return {"run": str(path), "step": opened.step, "routing": opened.routing}, drawn


def _with_batch_routing(
    run: Path, step: int | None, prompts: list[str], count: int, sampling: Sampling, shared: RankEnv | None
) -> tuple[dict[str, Any], list[_Drawn]]:
    from mmscale.inference.draw import draw
    from mmscale.inference.model import open_run

    with open_run(run, step=step, env=shared) as model:
        drawings = draw(
            model,
            prompts,
            count=count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        facts = {"run": str(run), "step": model.step, "routing": "batch"}
    return facts, [_Drawn(one.prompt, [picture]) for one in drawings for picture in one.images]


def _written(drawn: list[_Drawn], prompts: list[str], count: int, out: Path) -> dict[str, Any]:
    """Writes pictures, and says what there is: `samples`, `images`, `sheet` (None without pictures)."""
    from mmscale.data.image_files import save_png
    from mmscale.report.figures import sample_rows

    samples, files = [], []
    rows: list[tuple[str, list[Any]]] = [(prompt, []) for prompt in prompts]
    for number, one in enumerate(drawn):
        row, index = divmod(number, count)
        pieces: list[dict[str, str]] = []
        pictures = 0
        for piece in one.pieces:
            if isinstance(piece, str):
                pieces.append({"text": piece})
                continue
            file = out / (f"{row:02d}_{index}.png" if not pictures else f"{row:02d}_{index}_{pictures}.png")
            out.mkdir(parents=True, exist_ok=True)
            save_png(piece.reshape(*piece.shape[:2], -1), file)
            pieces.append({"image": str(file)})
            files.append(str(file))
            rows[row][1].append(piece)
            pictures += 1
        text = "".join(piece.get("text", "") for piece in pieces)
        length = {} if one.tokens is None else {"tokens": one.tokens, "ended": one.ended}
        samples.append({"prompt": one.prompt, "text": text, "pieces": pieces, **length})
    sheet = None
    if files:
        sheet = str(out / "samples.png")
        sample_rows(rows, Path(sheet))
    return {"sheet": sheet, "images": files, "samples": samples}


def _recognised(drawn: list[_Drawn]) -> dict[str, Any]:
    from mmscale.inference.recognise import recognise

    first = [next((piece for piece in one.pieces if not isinstance(piece, str)), None) for one in drawn]
    found = recognise([(one.prompt, picture) for one, picture in zip(drawn, first, strict=True)])
    by_word = {word: {"asked": asked, "right": right} for word, (asked, right) in found.by_word.items()}
    return {
        "asked": found.asked,
        "right": found.right,
        "share": found.share,
        "ceiling": found.ceiling,
        "by_word": by_word,
    }


def _print(result: dict[str, Any]) -> None:
    if result["routing"] == "batch":
        typer.echo(f"drew {len(result['images'])} images with batch routing, all of them in {result['sheet']}")
        typer.echo(_BATCH, err=True)
    else:
        for one in result["samples"]:
            parts = [piece["text"] if "text" in piece else f"[{piece['image']}]" for piece in one["pieces"]]
            typer.echo(f"{one['prompt']!r} -> {' '.join(parts)}{'' if one['ended'] else ' ...'}")
        where = f", all of them in {result['sheet']}" if result["sheet"] else ""
        typer.echo(f"{len(result['samples'])} samples with {len(result['images'])} images{where}", err=True)
    if "recognition" in result:
        found = result["recognition"]
        typer.echo(
            f"{found['right']} of {found['asked']} drawn digits ({found['share']:.1%}) are read as asked "
            f"by a classifier that reads {found['ceiling']:.1%} of real ones right"
        )
