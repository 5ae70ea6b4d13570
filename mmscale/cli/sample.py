"""Command that samples from a model.

`mmscale sample`: text and images from a run or an export. checkpoints_tools/huggingface/generator.py generates; with
batch routing mmscale/inference/draw.py draws. Imports torch only when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli import ranks
from mmscale.cli.named_files import check_model, existing, split_step
from mmscale.cli.output import Json, emit
from mmscale.cli.sample_options import (
    CD_ALPHA,
    UNCONDITIONAL,
    HoleOptions,
    best_of_options,
    holes_of,
    item_of,
    prompt_options,
    refuse_with_batch_routing,
    texts_of,
)
from mmscale.cli.sampled import GeneratedItem, GeneratedSample, show, written
from mmscale.errors import UsageError
from mmscale.runtime.activity import report_activity
from mmscale.tables.routings import Routing, meanings
from mmscale.wording import numbered

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
        float,
        typer.Option(
            "--temperature",
            min=0.0,
            help="Divides the logits before a token is drawn; 0: always the most likely token.",
        ),
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
    cd_k: Annotated[
        int | None,
        typer.Option(
            "--cd-k",
            metavar="K",
            show_default="none",
            help="Contrastive decoding (CD-K) of images, instead of --guidance: tokens with at least --cd-alpha times "
            "the K-th largest probability are ranked by how much the prompt raises theirs.",
        ),
    ] = None,
    cd_alpha: Annotated[
        float | None,
        typer.Option(
            "--cd-alpha",
            metavar="SHARE",
            show_default=f"{CD_ALPHA}",
            help="With --cd-k: smallest probability of a candidate, as a share of the K-th largest.",
        ),
    ] = None,
    unconditional: Annotated[
        str,
        typer.Option(
            "--unconditional",
            metavar="|".join(UNCONDITIONAL),
            help="What stands for the prompt in the other branch of --guidance and --cd-k. "
            + "; ".join(f"{name}: {meaning}" for name, meaning in UNCONDITIONAL.items())
            + ".",
        ),
    ] = "none",
    best_of: Annotated[
        int,
        typer.Option(
            "--best-of",
            metavar="N",
            help="Draw N samples for each one that is kept: the one after whose first image (with --begin, other item) "
            "the model finds the prompt most likely.",
        ),
    ] = 1,
    caption: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            metavar="TEXT",
            help="With --best-of: rank by this text instead of the prompt, e.g. 'this is a seven'; one per prompt.",
        ),
    ] = None,
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
    strength = prompt_options(guidance, cd_k, cd_alpha, unconditional)
    captions = best_of_options(best_of, caption, temperature=temperature)
    texts = texts_of(prompt, infill)
    files = tuple(existing(file, what="picture") for file in image or ())
    items = tuple(item_of(one) for one in item or ())
    stronger = {"--guidance": strength.guidance != 1, "--cd-k": strength.cd_k, "--best-of": best_of > 1}
    others = {"--chat": chat, "--draw": draw, "--begin": begin, "--item": items} | stronger
    holes = holes_of(infill, mask, pictures=len(files), others=others)
    if draw and begin:
        raise UsageError("--draw and --begin are both given", remedy="give one of them")
    needs_causal = {"--chat": chat, "--infill": holes, "--image": files, "--item": items, "--top-k": top_k}
    needs_causal |= stronger | {"--max-tokens": max_tokens}
    if not ranks.is_shared(nproc):
        names = [*(["image"] if files or draw else []), *(name for name, _ in items), *filter(None, [begin])]
        routing = _checked(path, step, routing, needs_causal, chat=chat, modalities=names)
    if ranks.starts_ranks(nproc):
        raise typer.Exit(ranks.start_for_a_while(nproc))
    shared = ranks.shared(nproc)
    shows = not as_json and (shared is None or shared.is_first)
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(report_activity("loading torch and transformers", enabled=shows))
        from mmscale.inference.generate import Sampling

        opened = None if routing == "batch" else _open(path, step, routing, shared, stack, update)
        compared, guided = None, strength.guidance
        if guided is None and opened is not None:
            update("comparing guidance on held-out documents")
            compared = _compared(path, opened, begin or "image", unconditional)
            guided = compared.best
        chosen = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=1.0 if guided is None else guided,
            cd_k=strength.cd_k,
            cd_alpha=strength.cd_alpha,
            unconditional=unconditional,
            max_tokens=max_tokens,
            seed=seed,
        )
        update(f"{'filling' if holes else 'continuing'} {numbered(len(texts), 'prompt')} {count * best_of} times")
        if opened is None:
            refuse_with_batch_routing(path, needs_causal)
            facts, drawn = _with_batch_routing(path, step, texts, begin, count, chosen, shared)
        else:
            asked = [(text, files, draw, items, begin, chat) for text in texts]
            facts, drawn = _continued(opened, path, asked, count, chosen, holes, best_of, captions)
            if compared is not None:
                losses = {f"{value:g}": loss for value, loss in compared.losses.items()}
                facts["guidance"] = {"chosen": compared.best, "items": compared.items, "losses": losses}
    if shared is not None and not shared.is_first:
        return
    result = facts | written(drawn, texts, count, out)
    emit(result, as_json=as_json, text=lambda: show(result))


def _checked(
    path: Path, step: int | None, routing: str | None, options: dict[str, Any], *, chat: bool, modalities: list[str]
) -> str | None:
    """The routing to generate with, before torch is loaded: batch if none was requested and a run has no other.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not support the routing.
        UsageError: one of `options` was given, which batch routing does not have; or the vocabulary lacks a modality,
            or tokens for messages.
    """
    from checkpoints_tools.huggingface.export_checks import NoRoutersError, check_asked, check_routers

    check_model(path, step)
    check_asked(path, step, chat=chat, modalities=modalities)
    if routing != "batch" and not (path / "config.json").is_file():
        try:
            check_routers(path, step, routing=routing or "causal")
        except NoRoutersError:
            if routing is not None:
                raise
            routing = "batch"
    if routing == "batch":
        refuse_with_batch_routing(path, options)
    return routing


def _open(
    path: Path,
    step: int | None,
    routing: str | None,
    shared: RankEnv | None,
    stack: contextlib.ExitStack,
    update: Callable[[str], None],
) -> Any:
    """A generator; None: no routing was requested, and the run has batch routing only."""
    from checkpoints_tools.huggingface.export_checks import NoRoutersError
    from checkpoints_tools.huggingface.generator import open_generator, open_on_ranks

    update(f"loading {path}")
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
    holes: HoleOptions | None,
    best_of: int,
    captions: tuple[str, ...],
) -> tuple[dict[str, Any], list[GeneratedSample]]:
    from checkpoints_tools.huggingface.best_of import best_samples
    from checkpoints_tools.huggingface.infill import infill
    from checkpoints_tools.huggingface.prompts import Prompt

    asked = [Prompt(*one) for one in prompts]
    if holes is not None:
        found = infill(opened, asked, mask=holes.mask, count=count, sampling=sampling)
    elif best_of > 1:
        found = best_samples(opened, asked, count=count, best_of=best_of, captions=captions, sampling=sampling)
    else:
        found = opened.sample(asked, count=count, sampling=sampling)
    for line in opened.resized(asked[0]) if asked[0].images else ():
        typer.echo(f"note: {line}", err=True)
    drawn = [
        GeneratedSample(
            one.prompt.text,
            [_made(piece) for piece in one.pieces],
            len(one.ids),
            one.ended,
            one.likelihood,
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
        return GeneratedItem("image", pixels.reshape(*pixels.shape[:2], -1))
    return GeneratedItem(piece.modality, piece.values, piece.codec.codec)


def _compared(path: Path, opened: Any, modality: str, unconditional: str) -> GuidanceSweep:
    from checkpoints_tools.huggingface.held_out_guidance import held_out_guidance

    return held_out_guidance(path, opened, modality=modality, unconditional=unconditional)


def _with_batch_routing(
    run: Path,
    step: int | None,
    prompts: list[str],
    modality: str,
    count: int,
    sampling: Sampling,
    shared: RankEnv | None,
) -> tuple[dict[str, Any], list[GeneratedSample]]:
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
    return facts, [
        GeneratedSample(one.prompt, [GeneratedItem(one.modality, own, one.codec)])
        for one in drawings
        for own in one.items
    ]
