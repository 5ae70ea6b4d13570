"""What `mmscale sample` writes and prints: generated items as files, one PNG with all images, and a line per sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mmscale.wording import numbered

_BATCH = (
    "routing: batch: experts choose among whole sequences, so that only images (with --begin, other items) are drawn, "
    "beside held-out documents"
)


@dataclass
class GeneratedItem:
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
class GeneratedSample:
    """Texts and items for one prompt, in order; for the best of several, `likelihood` of the prompt [nats]."""

    prompt: str
    pieces: list[Any]
    tokens: int | None = None
    ended: bool | None = None
    likelihood: float | None = None


def written(drawn: list[GeneratedSample], prompts: list[str], count: int, out: Path) -> dict[str, Any]:
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
        ranked = {} if one.likelihood is None else {"prompt_log_likelihood": one.likelihood}
        samples.append({"prompt": one.prompt, "text": text, "pieces": pieces, **length, **ranked})
    sheet = None
    if any(files.values()):
        sheet = str(out / "samples.png")
        sample_rows(rows, Path(sheet))
    return {"sheet": sheet, "images": files["image"], "files": files, "samples": samples}


def _items(result: dict[str, Any]) -> str:
    """Number of images and of other items, in words."""
    others = [numbered(len(own), f"{name} file") for name, own in result["files"].items() if own and name != "image"]
    images = [numbered(len(result["images"]), "image")] if result["images"] or not others else []
    return " and ".join([*images, *others])


def show(result: dict[str, Any]) -> None:
    """Print the result of `mmscale sample`."""
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
        typer.echo(f"{numbered(len(result['samples']), 'sample')} with {_items(result)}{where}", err=True)
