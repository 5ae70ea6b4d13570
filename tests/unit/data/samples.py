# Small document files with pictures, and configurations for `prepare`.
"""Documents for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.documents.schema import Item
from mmscale.data.modalities.image_tokens import LevelsTokenizer
from mmscale.data.modalities.table import read_item

SIZE = 4  # edge of the pictures [pixels]


def config(*, vocab: Mapping[str, int] | None = None, **prepare: Any) -> Config:
    """A configuration whose data.prepare has these settings; pictures become 16 grey levels."""
    sizes = vocab or {"text": 300, "image": 16}
    settings = {"image": {"kind": "levels", "size": SIZE, "channels": 1}, "held_out": 0.25, "workers": 1} | prepare
    return Config.model_validate(
        {
            "model": {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1},
            "vocab": {"modalities": [{"name": name, "size": size} for name, size in sizes.items()]},
            "data": {"prepare": settings},
        }
    )


def picture(seed: int, *, size: int = SIZE, channels: int = 1) -> NDArray[np.uint8]:
    """Random pixels uint8 [size, size, channels] in 16 grey levels."""
    levels = np.random.default_rng(seed).integers(0, 16, (size, size, channels))
    return (levels * 17).astype(np.uint8)


def load_image(image: Item, *, size: int, channels: int) -> NDArray[np.uint8]:
    """An image of a document as a tokenizer of this size gets it."""
    pixels: NDArray[np.uint8] = read_item(image, LevelsTokenizer(size, channels, 2))
    return pixels


def save_picture(file: Path, seed: int, **kwargs: int) -> None:
    """A PNG of `picture`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(seed, **kwargs)
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file)


def text(value: str) -> dict[str, Any]:
    """A text item."""
    return {"type": "text", "text": value}


def image(path: str) -> dict[str, Any]:
    """An image item."""
    return {"type": "image", "path": path}


def write_jsonl(file: Path, records: Sequence[Mapping[str, Any] | str]) -> Path:
    """One record a line; strings are written as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("".join(line + "\n" for line in lines))
    return file


def corpus(folder: Path, count: int) -> Path:
    """docs.jsonl: a caption and a picture in turn first, every third document text only."""
    records = []
    for number in range(count):
        name = f"img/{number % 7}.png"
        if number < 7:
            save_picture(folder / name, number)
        content = [text(f"picture number {number}"), image(name)][:: 1 if number % 2 else -1]
        records.append({"id": f"d{number}", "content": content[: 1 if number % 3 == 1 else 2]})
    return write_jsonl(folder / "docs.jsonl", records)


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file of a data set but its lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
