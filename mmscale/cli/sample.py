"""Command that samples from a model.

`mmscale sample`: text and images from a run or an export. checkpoints_tools/huggingface/generator.py generates; with
batch routing mmscale/inference/draw.py draws. Imports torch only when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.named_files import check_model, existing, split_step
from mmscale.cli.output import Json, emit
from mmscale.cli.sampled import Drawn, Made, recognised, show, written
from mmscale.errors import UsageError
from mmscale.runtime.waiting import waiting
from mmscale.tables.routings import Routing, meanings

if TYPE_CHECKING:
    from mmscale.inference.generate import Sampling
    from mmscale.inference.guidance import GuidanceSweep
    from mmscale.runtime.rank_env import RankEnv


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|HF_DIR",
            help="Run folder (newest checkpoint unless a step is named), or a folder of `convert to-hf`.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Text of the prompt; may be repeated. Each <image> in it is replaced by one of the --image files.",
        ),
    ] = None,
    infill: Annotated[
        list[str] | None,
        typer.Option(
            "--infill",
            metavar="TEXT",
            help="A document in which each <hole> is filled, instead of a prompt that is continued; may be repeated. "
            "Needs a model trained with objective.cm3_rate.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask",
            metavar="X,Y,W,H",
            help="With --infill: a hole in the --image, a rectangle of its tokens, counted from the top left corner.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Each prompt is a message of the user; the model answers it, as it learned in --stage sft."
        ),
    ] = (False),
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="Image for every prompt, before its text; may be repeated."),
    ] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Begin an image after the prompt instead of letting the model decide.")
    ] = (False),
    item: Annotated[
        list[str] | None,
        typer.Option(
            "--item",
            metavar="MODALITY=FILE",
            help="File of another modality for every prompt, e.g. audio=a.wav; replaces <audio>, or comes before the "
            "text.",
        ),
    ] = None,
    begin: Annotated[
        str,
        typer.Option(
            "--begin", metavar="MODALITY", show_default=False, help="Like --draw, for an item of this modality."
        ),
    ] = "",
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            show_default="causal, or batch if a run has no auxiliary routers",
            help=f"How experts are selected. {meanings(Routing)} Under batch routing only images can be drawn.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for PNG and other files.")] = Path(
        "samples"
    ),
    count: Annotated[int, typer.Option("--count", min=1, help="Continuations of each prompt.")] = 4,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            show_default="what the context has room for",
            help="Length of the longest continuation, in tokens.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Number of most likely tokens to sample from; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Probability mass of the tokens to sample from.")
    ] = 1.0,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance",
            metavar="NUMBER|auto",
            help="Classifier-free guidance of images; 1: none. Larger values help if drawings ignore the prompt, and "
            "hurt if they follow it already. auto: compares values on held-out documents and takes the best.",
        ),
    ] = "1",
    recognise: Annotated[
        bool,
        typer.Option(
            "--recognise",
            help="Digits: report how many drawings a classifier trained on real digits reads as requested.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    nproc: ranks.OnRanks = None,
    as_json: Json = False,
) -> None:
    """Continue prompts of text, images and audio, or fill holes, and write generated items and a PNG of all images."""
    path, step = split_step(model)
    if routing is not None and routing not in tuple(Routing):
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(Routing)}")
    if routing == "batch" and (path / "config.json").is_file():
        raise UsageError(
            "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
        )
    if (path / "config.json").is_file():
        ranks.refuse(nproc, "an export")
    guided = _guidance(guidance)
    texts = _texts(prompt, infill)
    files = tuple(existing(file, what="picture") for file in image or ())
    items = tuple(_item(one) for one in item or ())
    others = {"--chat": chat, "--draw": draw, "--begin": begin, "--item": items, "--guidance": guided != 1}
    holes = _holes(infill, mask, pictures=len(files), others=others)
    if draw and begin:
        raise UsageError("--draw and --begin are both given", remedy="give one of them")
    not_with_batch_routing = {
        "--chat": chat,
        "--infill": holes,
        "--image": files,
        "--item": items,
        "--top-k": top_k,
        "--guidance": guided != 1,
        "--max-tokens": max_tokens,
    }
    if not ranks.is_shared(nproc):
        routing = _checked(path, step, routing, not_with_batch_routing)
    if ranks.starts_ranks(nproc):
        raise typer.Exit(ranks.start_for_a_while(nproc))
    shared = ranks.shared(nproc)
    shows = not as_json and (shared is None or shared.is_first)
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(waiting("loading torch and transformers", enabled=shows))
        from mmscale.inference.generate import Sampling

        opened = None if routing == "batch" else _open(path, step, routing, shared, stack, tell)
        compared = None
        if guided is None and opened is not None:
            tell("comparing guidance on held-out documents")
            compared = _compared(path, opened, begin or "image")
            guided = compared.best
        chosen = Sampling(temperature, top_k, top_p, 1.0 if guided is None else guided, max_tokens, seed)
        tell(f"{'filling' if holes else 'continuing'} {_counted(texts)} {count} times")
        if opened is None:
            _refuse_with_batch_routing(not_with_batch_routing)
            facts, drawn = _with_batch_routing(path, step, texts, begin, count, chosen, shared)
        else:
            asked = [(text, files, draw, items, begin, chat) for text in texts]
            facts, drawn = _continued(opened, path, asked, count, chosen, holes)
            if compared is not None:
                losses = {f"{value:g}": loss for value, loss in compared.losses.items()}
                facts["guidance"] = {"chosen": compared.best, "items": compared.items, "losses": losses}
    if shared is not None and not shared.is_first:
        return
    result = facts | written(drawn, texts, count, out)
    if recognise:
        result["recognition"] = recognised(drawn)
    emit(result, as_json=as_json, text=lambda: show(result))


def _checked(path: Path, step: int | None, routing: str | None, options: dict[str, Any]) -> str | None:
    """The routing to generate with, before torch is loaded: batch if none was requested and a run has no other.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not support the routing.
        UsageError: one of `options` was given, which batch routing does not have.
    """
    check_model(path, step)
    if routing != "batch" and not (path / "config.json").is_file():
        from checkpoints_tools.huggingface.export_checks import NoRoutersError, check_routers

        try:
            check_routers(path, step, routing=routing or "causal")
        except NoRoutersError:
            if routing is not None:
                raise
            routing = "batch"
    if routing == "batch":
        _refuse_with_batch_routing(options)
    return routing


def _open(
    path: Path,
    step: int | None,
    routing: str | None,
    shared: RankEnv | None,
    stack: contextlib.ExitStack,
    tell: Callable[[str], None],
) -> Any:
    """A generator; None: no routing was requested, and the run has batch routing only."""
    from checkpoints_tools.huggingface.export_checks import NoRoutersError
    from checkpoints_tools.huggingface.generator import open_generator, open_on_ranks

    tell(f"loading {path}")
    try:
        if shared is not None:
            return stack.enter_context(open_on_ranks(path, step, routing=routing, env=shared))
        return open_generator(path, step, routing=routing)
    except NoRoutersError:
        if routing is not None:
            raise
        return None


def _continued(
    opened: Any,
    path: Path,
    prompts: list[tuple[Any, ...]],
    count: int,
    sampling: Sampling,
    holes: _Holes | None,
) -> tuple[dict[str, Any], list[Drawn]]:
    from checkpoints_tools.huggingface.infill import infill
    from checkpoints_tools.huggingface.prompts import Prompt

    asked = [Prompt(*one) for one in prompts]
    if holes is None:
        found = opened.sample(asked, count=count, sampling=sampling)
    else:
        found = infill(opened, asked, mask=holes.mask, count=count, sampling=sampling)
    for line in opened.resized(asked[0]) if asked[0].images else ():
        typer.echo(f"note: {line}", err=True)
    drawn = [
        Drawn(
            one.prompt.text,
            [_made(piece) for piece in one.pieces],
            len(one.ids),
            one.ended,
        )
        for one in found
    ]
    return {"run": str(path), "step": opened.step, "routing": opened.routing}, drawn


def _made(piece: Any) -> Any:
    """Converts a Pillow image or a piece of the processor to an item; a text is unchanged."""
    import numpy as np
    import PIL.Image

    if isinstance(piece, str):
        return piece
    if isinstance(piece, PIL.Image.Image):
        pixels = np.asarray(piece)
        return Made("image", pixels.reshape(*pixels.shape[:2], -1))
    return Made(piece.modality, piece.values, piece.codec.codec)


def _guidance(given: str) -> float | None:
    """A non-negative number; None: auto."""
    if given == "auto":
        return None
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--guidance {given!r} is no number from 0 on, nor auto", remedy="for example: --guidance 2")
    return value


def _compared(path: Path, opened: Any, modality: str) -> GuidanceSweep:
    from checkpoints_tools.huggingface.held_out_guidance import held_out_guidance

    return held_out_guidance(path, opened, modality=modality)


def _texts(prompt: list[str] | None, infill: list[str] | None) -> list[str]:
    """The prompts, or the documents with holes."""
    if bool(prompt) == bool(infill):
        given = "both given" if prompt else "neither given"
        raise UsageError(f"--prompt and --infill are {given}", remedy="give one of them; both may be repeated")
    return [*(prompt or ()), *(infill or ())]


def _counted(texts: list[str]) -> str:
    return f"{len(texts)} {'prompt' if len(texts) == 1 else 'prompts'}"


@dataclass(frozen=True)
class _Holes:
    """Holes are filled; `mask` is one in the picture of each document: x, y, width and height in tokens."""

    mask: tuple[int, int, int, int] | None


def _holes(infill: list[str] | None, mask: str | None, *, pictures: int, others: dict[str, Any]) -> _Holes | None:
    """None: prompts are continued. `others`: options that cannot be combined with holes, and their values."""
    if not infill:
        if mask is not None:
            raise UsageError("--mask is given without --infill", remedy='for example: --infill "a cat" --mask 2,2,4,4')
        return None
    given = [name for name, value in others.items() if value]
    if given:
        raise UsageError(f"{', '.join(given)}: not with --infill", remedy="leave it away")
    if mask is None:
        return _Holes(None)
    if pictures != 1:
        raise UsageError(f"--mask is given with {pictures} pictures", remedy="give one: --image FILE")
    parts = mask.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--mask {mask!r} is not X,Y,WIDTH,HEIGHT", remedy="for example: --mask 2,2,4,4")
    x, y, width, height = map(int, parts)
    return _Holes((x, y, width, height))


def _refuse_with_batch_routing(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not with batch routing, which draws items for texts only",
            remedy="train auxiliary routers: `mmscale train CONFIG --stage auxiliary`, and use --routing causal",
        )


def _item(given: str) -> tuple[str, Path]:
    name, equals, file = given.partition("=")
    if not name or not equals or not file:
        raise UsageError(f"--item {given!r} is not MODALITY=FILE", remedy="for example: --item audio=seven.wav")
    return name, existing(Path(file))


def _with_batch_routing(
    run: Path,
    step: int | None,
    prompts: list[str],
    modality: str,
    count: int,
    sampling: Sampling,
    shared: RankEnv | None,
) -> tuple[dict[str, Any], list[Drawn]]:
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
            modality=modality or "image",
        )
        facts = {"run": str(run), "step": model.step, "routing": "batch"}
    return facts, [Drawn(one.prompt, [Made(one.modality, own, one.codec)]) for one in drawings for own in one.items]
