"""`mmscale data inspect`: what a prepared data set holds, and one document drawn back as text and PNG files.

It reads only; nothing here trains or encodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.data import image_tokens
from mmscale.data.documents import TRAIN
from mmscale.data.encode import IMAGE
from mmscale.data.image_files import save_png, to_picture
from mmscale.data.image_tokens import ImageTokenizer, load_image_tokenizer, open_image_tokenizer
from mmscale.data.manifest import Manifest, Part, read_manifest, read_table
from mmscale.data.parts import read_document
from mmscale.data.shared_content import shared_content
from mmscale.data.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.vocab import SPECIAL_TOKENS, Vocabulary
from mmscale.errors import DataError

_SHEET_WIDTH = 640  # pixels
_SHEET_IMAGE = 128  # edge of an image on the sheet [pixels]
_SHEET_GAP = 8  # pixels
_SHEET_LINE = 16  # height of a line of Pillow's built-in font [pixels]


def summary(folder: Path) -> dict[str, Any]:
    """Documents, tokens, lengths, vocabulary and tokenizers of a data set, ready for JSON.

    Raises:
        DataError: the data set is missing, unfinished or damaged.
    """
    manifest = read_manifest(folder)
    text = open_text_tokenizer(folder)
    ranges = dict(zip(manifest.modalities, manifest.ranges, strict=True))
    return {
        "folder": str(folder),
        "splits": {name: _split_summary(folder, manifest, name) for name in manifest.splits},
        "vocabulary": {
            "fingerprint": manifest.vocabulary,
            "ranges": {name: list(pair) for name, pair in ranges.items()},
        },
        "text_tokenizer": {"fingerprint": manifest.text_tokenizer, "ids_in_use": text.vocab_size},
        "image_tokenizer": _image_summary(folder, manifest),
        "tasks": [task.name for task in manifest.tasks],
        "rejected": manifest.rejected,
        "held_out_in_training": {key: list(pair) for key, pair in asdict(shared_content(folder, manifest)).items()},
    }


def lines(folder: Path, split: str) -> Iterator[str]:
    """Every document of a split in one line, its images as marks.

    Raises:
        DataError: the data set is missing or damaged, or there is no such split.
    """
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"data: {folder} has no split {split!r}", remedy=f"one of {', '.join(manifest.splits)}")
    text = open_text_tokenizer(folder)
    for part in manifest.splits[split].parts:
        for index in range(part.documents):
            yield _marked(read_document(folder, part, index), text, manifest).replace("\n", " ")


def _split_summary(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    split = manifest.splits[name]
    tables = [read_table(folder, part) for part in split.parts]
    found: dict[str, Any] = {
        "documents": split.documents,
        "tokens": {modality: split.tokens(modality) for modality in manifest.modalities},
        "share": {modality: round(share, 4) for modality, share in manifest.share(name).items()},
    }
    if tables:
        lengths = np.concatenate([table[:, :-1].sum(axis=1) for table in tables])
        found["document_tokens"] = {
            "mean": round(float(lengths.mean()), 2),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
        }
    return found


def _image_summary(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    if not (folder / image_tokens.FOLDER).is_dir():
        return None
    tokenizer = open_image_tokenizer(folder)
    try:
        measured = bounded.read_object(folder / image_tokens.FOLDER / image_tokens.QUALITY)
    except (OSError, ValueError):
        measured = {}
    return {
        "fingerprint": manifest.image_tokenizer,
        "kind": tokenizer.kind,
        "codes": tokenizer.vocab_size,
        "size": tokenizer.size,
        "channels": tokenizer.channels,
        "grid": list(tokenizer.grid),
        "tokens_per_image": tokenizer.tokens_per_image,
    } | {key: measured[key] for key in ("psnr_db", "exact", "codes_used") if key in measured}


def draw_sample(folder: Path, index: int, out: Path, *, split: str = TRAIN) -> dict[str, Any]:
    """Draw one document back: its text, its images as PNG files, and all of it on one contact sheet.

    Args:
        folder: the data set.
        index: number of the document in its split.
        out: folder of the PNG files; made if it is missing.
        split: name of the split.

    Returns:
        `text` (special tokens and images as marks), `content` (pieces as in a document file), `images` and `sheet`
        (files), `tokens` per modality, `loss` (modalities whose labels are trained on).

    Raises:
        DataError: the data set is missing or damaged, or there is no such document.
    """
    manifest = read_manifest(folder)
    part, position = _locate(folder, manifest, split, index)
    ids = read_document(folder, part, position)
    row = read_table(folder, part)[position]
    text = open_text_tokenizer(folder)
    has_images = (folder / image_tokens.FOLDER).is_dir()
    tokenizer = load_image_tokenizer(folder / image_tokens.FOLDER) if has_images else None
    out.mkdir(parents=True, exist_ok=True)

    content: list[dict[str, Any]] = []
    drawn: list[NDArray[np.uint8]] = []
    files: list[str] = []
    for modality, run in _runs(ids, Vocabulary(manifest.modalities, manifest.ranges)):
        if modality == manifest.modalities[0]:
            content += [{"type": "text", "text": piece} for piece in _texts(run, text)]
            continue
        codes = run - manifest.ranges[manifest.modalities.index(modality)][0]
        pixels = _pixels(codes, tokenizer) if modality == IMAGE else None
        if pixels is None:
            content.append({"type": "tokens", "modality": modality, "ids": codes.tolist()})
            continue
        file = out / f"{split}-{index}-image-{len(files)}.png"
        save_png(pixels, file)
        files.append(str(file))
        drawn.append(pixels)
        content.append({"type": "image", "path": file.name})
    sheet = out / f"{split}-{index}-sheet.png"
    marked = _marked(ids, text, manifest)
    _contact_sheet(marked, drawn).save(sheet, format="PNG")
    return {
        "split": split,
        "index": index,
        "text": marked,
        "content": content,
        "images": files,
        "sheet": str(sheet),
        "tokens": dict(zip(manifest.modalities, row[:-1].tolist(), strict=True)),
        "loss": [name for bit, name in enumerate(manifest.modalities) if int(row[-1]) >> bit & 1],
    }


def _locate(folder: Path, manifest: Manifest, split: str, index: int) -> tuple[Part, int]:
    if split not in manifest.splits:
        raise DataError(f"data: {folder} has no split {split!r}", remedy=f"one of {', '.join(manifest.splits)}")
    position = index
    for part in manifest.splits[split].parts:
        if 0 <= position < part.documents:
            return part, position
        position -= part.documents
    last = manifest.splits[split].documents - 1
    raise DataError(f"data: split {split} of {folder} has no document {index}", remedy=f"ask for 0..{last}")


def _runs(ids: NDArray[np.int64], vocabulary: Vocabulary) -> list[tuple[str, NDArray[np.int64]]]:
    """Neighbouring ids of one modality; two images side by side are parted by their <eoi> and <boi>."""
    modality = vocabulary.modality_of(ids)
    borders = np.flatnonzero(np.diff(modality)) + 1
    return [
        (vocabulary.names[int(vocabulary.modality_of(run[:1])[0])], run) for run in np.split(ids, borders) if len(run)
    ]


def _texts(run: NDArray[np.int64], tokenizer: TextTokenizer) -> list[str]:
    """Text between special tokens."""
    pieces = np.split(run, np.flatnonzero(run < len(SPECIAL_TOKENS)))
    decoded = (tokenizer.decode(piece) for piece in pieces)  # a piece may start with the special token: left out
    return [piece for piece in decoded if piece]


def _pixels(codes: NDArray[np.int64], tokenizer: ImageTokenizer | None) -> NDArray[np.uint8] | None:
    if tokenizer is None or len(codes) != tokenizer.tokens_per_image or codes.max() >= tokenizer.vocab_size:
        return None
    try:
        return np.asarray(tokenizer.decode(codes[None])[0])
    except DataError:  # a tokenizer that cannot draw: the codes are shown instead
        return None


def _marked(ids: NDArray[np.int64], tokenizer: TextTokenizer, manifest: Manifest) -> str:
    """The whole document in one line: `<s><boi>[image 0: 16 tokens]<eoi>this is a seven</s>`."""
    pieces, images = [], 0
    for modality, run in _runs(ids, Vocabulary(manifest.modalities, manifest.ranges)):
        if modality == manifest.modalities[0]:
            for piece in np.split(run, np.flatnonzero(run < len(SPECIAL_TOKENS))):
                if len(piece) and piece[0] < len(SPECIAL_TOKENS):
                    pieces.append(SPECIAL_TOKENS[piece[0]])
                pieces.append(tokenizer.decode(piece))
        elif modality == IMAGE:
            pieces.append(f"[image {images}: {len(run)} tokens]")
            images += 1
        else:
            pieces.append(f"[{modality}: {len(run)} tokens]")
    return "".join(pieces)


def _contact_sheet(text: str, images: Sequence[NDArray[np.uint8]]) -> PIL.Image.Image:
    """The text above the images, enlarged without smoothing so that single pixels can be told apart."""
    width = (_SHEET_WIDTH - 2 * _SHEET_GAP) // 7  # the built-in font is about 7 pixels wide
    # the built-in font has no glyphs beyond Latin-1
    shown = text.encode("latin-1", "replace").decode("latin-1")
    lines = [shown[at : at + width] for at in range(0, len(shown), width)][:40]
    lines = [line.replace("\n", " ") for line in lines]
    columns = _SHEET_WIDTH // (_SHEET_IMAGE + _SHEET_GAP)
    rows = -(-len(images) // columns)
    top = _SHEET_GAP + _SHEET_LINE * len(lines)
    height = top + rows * (_SHEET_IMAGE + _SHEET_GAP) + _SHEET_GAP
    sheet = PIL.Image.new("RGB", (_SHEET_WIDTH, height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_SHEET_GAP, _SHEET_GAP + number * _SHEET_LINE), line, fill="black")
    for number, pixels in enumerate(images):
        row, column = divmod(number, columns)
        picture = to_picture(pixels).convert("RGB").resize((_SHEET_IMAGE,) * 2, PIL.Image.Resampling.NEAREST)
        sheet.paste(
            picture, (_SHEET_GAP + column * (_SHEET_IMAGE + _SHEET_GAP), top + row * (_SHEET_IMAGE + _SHEET_GAP))
        )
    return sheet
