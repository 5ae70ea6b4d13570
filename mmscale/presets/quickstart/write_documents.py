"""Writes scikit-learn's handwritten digits as documents that read and draw them, and a task: which digit is it?

    python write_documents.py --out data/digits-documents

writes OUT/documents.jsonl, OUT/digit.jsonl and the pictures of both, OUT/img. 1,797 images of 8x8 pixels with 17 grey
levels come with scikit-learn. About a sixth of the images is held out, the same share of every digit. The same writers
occur in both splits, so the task does not measure generalisation to new writers.

Files that have their content already are left alone, so that `mmscale data prepare` does not prepare them again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The word comes last, so that everything before it is the question. "a eight" is wrong English on purpose: "an" would
# give the answer away.
DESCRIBE = ("this is a {}", "it shows a {}", "the digit is {}", "somebody wrote a {}")
DRAW = ("draw a {}", "show me a {}", "write the digit {}", "a picture of a {}")
SHIFTS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))
HELD_OUT = 6  # one image in six


@dataclass(frozen=True)
class Digits:
    """All images.

    Attributes:
        images: uint8 [1797, 8, 8], 0..255 in 17 steps.
        labels: the digits, int64 [1797].
        held_out: whether an image is for validation, bool [1797].
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    held_out: NDArray[np.bool_]


def digits() -> Digits:
    """The images of scikit-learn in their order, with their split."""
    found = load_digits()
    # 0..16 -> 0..255; rounding to 17 grey levels gives the values back exactly
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(len(WORDS)):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda index: number("split", index))
        held_out[members[: round(len(members) / HELD_OUT)]] = True
    return Digits(images, labels, held_out)


def number(purpose: str, index: int) -> int:
    """A number that is independent of the label; the digits are stored in the order 0, 1, .. 9, 0, 1, .."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{index}".encode()).digest()[:8], "big")


def shifted(pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """Pixels [8, 8] moved by one pixel; black pixels are moved in, and pixels at the edge are lost."""
    padded = np.pad(pixels, 1)
    height, width = pixels.shape
    return padded[1 - down : 1 - down + height, 1 - right : 1 - right + width]


def pictures(found: Digits, copies: int) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Index, number of the copy and pixels [8, 8]: all images as they are, then shifted copies of training images."""
    for index, pixels in enumerate(found.images):
        yield index, 0, pixels
    for copy in range(1, copies + 1):
        for index in np.flatnonzero(~found.held_out).tolist():
            yield index, copy, shifted(found.images[index], *SHIFTS[(number("shift", index) + copy) % len(SHIFTS)])


def documents(found: Digits, index: int, copy: int) -> list[dict[str, Any]]:
    """The document that describes an image, and the one that draws it."""
    word, template = WORDS[found.labels[index]], number("template", index) + copy
    image = {"type": "image", "path": path_of(index, copy)}
    describe = {"type": "text", "text": DESCRIBE[template % len(DESCRIBE)].format(word)}
    draw = {"type": "text", "text": DRAW[template % len(DRAW)].format(word)}
    name, split = f"digits-{index:04d}-{copy}", "validation" if found.held_out[index] else "train"
    return [
        {"id": f"{name}-describe", "split": split, "content": [image, describe]},
        {"id": f"{name}-draw", "split": split, "content": [draw, image]},
    ]


def question(found: Digits, index: int) -> dict[str, Any]:
    """The question of a held-out image: its describing document without the word, and the ten words to choose from."""
    template = DESCRIBE[number("template", index) % len(DESCRIBE)]
    content = [{"type": "image", "path": path_of(index, 0)}, {"type": "text", "text": template.removesuffix(" {}")}]
    # the word decides, not what a model expects behind it
    asked = {"choices": [f" {word}" for word in WORDS], "answer": int(found.labels[index]), "end": False}
    return {"id": f"digits-{index:04d}", "content": content} | asked


def path_of(index: int, copy: int) -> str:
    """File of a picture, relative to the folder of the documents."""
    return f"img/{index:04d}-{copy}.png"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Grey pixels [8, 8] as a PNG file."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def put(file: Path, content: bytes) -> None:
    """Write a file as a whole, unless it has this content already."""
    if file.is_file() and file.read_bytes() == content:
        return
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def lines(records: list[dict[str, Any]]) -> bytes:
    """Records as JSONL."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def main(arguments: list[str]) -> int:
    """Write pictures, the task and the documents, in this order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/digits-documents")
    parser.add_argument(
        "--copies",
        type=int,
        choices=range(len(SHIFTS) + 1),
        default=4,
        help="copies of each training image, shifted by one pixel (default 4): without them a model learns the 1,498 "
        "images by heart",
    )
    asked = parser.parse_args(arguments)
    out: Path = asked.out
    found, records = digits(), []
    (out / "img").mkdir(parents=True, exist_ok=True)
    for index, copy, pixels in pictures(found, asked.copies):
        put(out / path_of(index, copy), png(pixels))
        records += documents(found, index, copy)
    questions = [question(found, index) for index in np.flatnonzero(found.held_out).tolist()]
    put(out / "digit.jsonl", lines(questions))
    put(out / "documents.jsonl", lines(records))
    sys.stdout.write(f"{out}: {len(records)} documents, {len(questions)} questions\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
