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
from mmscale.cli.named_files import existing
from mmscale.cli.output import Json, emit
from mmscale.cli.train import split_step
from mmscale.errors import UsageError
from mmscale.runtime.waiting import waiting
from mmscale.tables.routings import Routing, meanings

if TYPE_CHECKING:
    from mmscale.inference.generate import Sampling
    from mmscale.inference.guidance import GuidanceSweep
    from mmscale.runtime.rank_env import RankEnv

_BATCH = (
    "routing: batch: experts choose among whole sequences, so that only images (with --begin, other items) are drawn, "
    "beside held-out documents"
)


@dataclass
class _Made:
    """A generated item.

    Attributes:
        modality: its name.
        values: decoded by its tokenizer; for an image pixels uint8 [height, width, channels].
        codec: the tokenizer; None for an image.
    """

    modality: str
    values: Any
    codec: Any = None


@dataclass
class _Drawn:
    """The result for one prompt, in order: texts and items."""

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
            "--prompt",
            metavar="TEXT",
            help="Text of the prompt; may be repeated. Each <image> in it is replaced by one of the --image files.",
        ),
    ],
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
    """Continue prompts of text, images and audio, and write the generated items and a PNG with all images."""
    path, step = split_step(model)
    if routing is not None and routing not in tuple(Routing):
        raise UsageError(f"--routing {routing!r} is not a routing", remedy=f"choose one of {', '.join(Routing)}")
    if routing == "batch" and (path / "config.json").is_file():
        raise UsageError(
            "batch routing needs a run: an export has none", remedy="use --routing causal, or name the run"
        )
    if (path / "config.json").is_file():
        ranks.refuse(nproc, "an export")
    if ranks.starts_ranks(nproc):
        raise typer.Exit(ranks.start_for_a_while(nproc))
    shared = ranks.shared(nproc)
    shows = not as_json and (shared is None or shared.is_first)
    guided = _guidance(guidance)
    files = tuple(existing(file, what="picture") for file in image or ())
    items = tuple(_item(one) for one in item or ())
    if draw and begin:
        raise UsageError("--draw and --begin are both given", remedy="give one of them")
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
        tell(f"continuing {len(prompt)} {'prompt' if len(prompt) == 1 else 'prompts'} {count} times")
        if opened is None:
            only_batch = [
                ("--image", files),
                ("--item", items),
                ("--top-k", top_k),
                ("--guidance", guided != 1),
                ("--max-tokens", max_tokens),
            ]
            given = [name for name, value in only_batch if value]
            if given:
                raise UsageError(
                    f"{', '.join(given)}: not with batch routing, which draws items for texts only",
                    remedy="train auxiliary routers: `mmscale train CONFIG --stage auxiliary`, and use "
                    "--routing causal",
                )
            facts, drawn = _with_batch_routing(path, step, prompt, begin, count, chosen, shared)
        else:
            asked = [(text, files, draw, items, begin) for text in prompt]
            facts, drawn = _continued(opened, path, asked, count, chosen)
            if compared is not None:
                losses = {f"{value:g}": loss for value, loss in compared.losses.items()}
                facts["guidance"] = {"chosen": compared.best, "items": compared.items, "losses": losses}
    if shared is not None and not shared.is_first:
        return
    result = facts | _written(drawn, prompt, count, out)
    if recognise:
        result["recognition"] = _recognised(drawn)
    emit(result, as_json=as_json, text=lambda: _print(result))


def _open(
    path: Path,
    step: int | None,
    routing: str | None,
    shared: RankEnv | None,
    stack: contextlib.ExitStack,
    tell: Callable[[str], None],
) -> Any:
    """A generator; None: no routing was requested, and the run has batch routing only."""
    from checkpoints_tools.huggingface.generator import open_generator, open_on_ranks
    from checkpoints_tools.huggingface.to_hf import NoRoutersError

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
    opened: Any, path: Path, prompts: list[tuple[Any, ...]], count: int, sampling: Sampling
) -> tuple[dict[str, Any], list[_Drawn]]:
    from checkpoints_tools.huggingface.prompts import Prompt

    asked = [Prompt(*one) for one in prompts]
    found = opened.sample(asked, count=count, sampling=sampling)
    for line in opened.resized(asked[0]) if asked[0].images else ():
        typer.echo(f"note: {line}", err=True)
    drawn = [
        _Drawn(
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
        return _Made("image", pixels.reshape(*pixels.shape[:2], -1))
    return _Made(piece.modality, piece.values, piece.codec.codec)


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
            modality=modality or "image",
        )
        facts = {"run": str(run), "step": model.step, "routing": "batch"}
    return facts, [_Drawn(one.prompt, [_Made(one.modality, own, one.codec)]) for one in drawings for own in one.items]


def _written(drawn: list[_Drawn], prompts: list[str], count: int, out: Path) -> dict[str, Any]:
    """Writes items and returns a summary: `samples`, `images`, `files` by modality, `sheet` (None without items)."""
    from mmscale.data.modalities.table import MODALITIES
    from mmscale.report.figures import sample_rows

    samples: list[dict[str, Any]] = []
    files: dict[str, list[str]] = {"image": []}
    rows: list[tuple[str, list[Any]]] = [(prompt, []) for prompt in prompts]
    for number, one in enumerate(drawn):
        row, index = divmod(number, count)
        pieces: list[dict[str, str]] = []
        for piece in one.pieces:
            if isinstance(piece, str):
                pieces.append({"text": piece})
                continue
            kind = MODALITIES[piece.modality]
            before = sum("text" not in other for other in pieces)
            file = out / (f"{row:02d}_{index}" + (f"_{before}" if before else "") + kind.written)
            out.mkdir(parents=True, exist_ok=True)
            kind.write(piece.values, file, piece.codec)
            pieces.append({piece.modality: str(file)})
            files.setdefault(piece.modality, []).append(str(file))
            rows[row][1].append(kind.picture(piece.values, piece.codec))
        text = "".join(piece.get("text", "") for piece in pieces)
        length = {} if one.tokens is None else {"tokens": one.tokens, "ended": one.ended}
        samples.append({"prompt": one.prompt, "text": text, "pieces": pieces, **length})
    sheet = None
    if any(files.values()):
        sheet = str(out / "samples.png")
        sample_rows(rows, Path(sheet))
    return {"sheet": sheet, "images": files["image"], "files": files, "samples": samples}


def _recognised(drawn: list[_Drawn]) -> dict[str, Any]:
    from mmscale.inference.recognise import recognise

    first = [
        next((piece.values for piece in one.pieces if isinstance(piece, _Made) and piece.modality == "image"), None)
        for one in drawn
    ]
    found = recognise([(one.prompt, picture) for one, picture in zip(drawn, first, strict=True)])
    by_word = {word: {"asked": asked, "right": right} for word, (asked, right) in found.by_word.items()}
    return {
        "asked": found.asked,
        "right": found.right,
        "share": found.share,
        "ceiling": found.ceiling,
        "by_word": by_word,
    }


def _items(result: dict[str, Any]) -> str:
    """Number of images and of other items, in words."""
    others = [f"{len(own)} {name} files" for name, own in result["files"].items() if own and name != "image"]
    images = [f"{len(result['images'])} images"] if result["images"] or not others else []
    return " and ".join([*images, *others])


def _print(result: dict[str, Any]) -> None:
    if "guidance" in result:
        found = result["guidance"]
        losses = ", ".join(f"{value}: {loss:.4f}" for value, loss in found["losses"].items())
        typer.echo(
            f"guidance {found['chosen']:g} fits {found['items']} held-out items best ({losses} nats a token)", err=True
        )
    if result["routing"] == "batch":
        typer.echo(f"drew {_items(result)} with batch routing, all of them in {result['sheet']}")
        typer.echo(_BATCH, err=True)
    else:
        for one in result["samples"]:
            parts = [piece.get("text") or f"[{next(iter(piece.values()))}]" for piece in one["pieces"]]
            typer.echo(f"{one['prompt']!r} -> {' '.join(parts)}{'' if one['ended'] else ' ...'}")
        where = f", all of them in {result['sheet']}" if result["sheet"] else ""
        typer.echo(f"{len(result['samples'])} samples with {_items(result)}{where}", err=True)
    if "recognition" in result:
        found = result["recognition"]
        typer.echo(
            f"{found['right']} of {found['asked']} drawn digits ({found['share']:.1%}) are read as asked "
            f"by a classifier that reads {found['ceiling']:.1%} of real ones right"
        )
