"""Says how many drawn digits a simple classifier reads as requested.

    mmscale sample RUN --prompt "draw a seven" --count 20 --out drawings --json > drawings.json
    python examples/digits/recognise.py data/digits-documents drawings.json

It measures whether generation works at all, not the quality of a picture. The classifier, a support vector machine, is
fitted to the training images of the documents (examples/digits/write_documents.py). It reads 99.0 % of the held-out
images correctly, so most errors on generated ones are the generator's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from sklearn.svm import SVC

from mmscale import bounded

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORIGINAL = re.compile(r"digits-\d+-0-describe")  # ids of one document of every image that is not shifted
EDGE = 8  # pixels


def labelled(documents: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 8, 8] and their digits [n] of one split."""
    images, labels = [], []
    for line in (documents / "documents.jsonl").read_text().splitlines():
        document = bounded.parse_json(line)
        if document["split"] == split and ORIGINAL.fullmatch(document["id"]):
            picture, caption = document["content"]
            images.append(pixels(documents / picture["path"]))
            labels.append(WORDS.index(caption["text"].split()[-1]))
    return np.stack(images), np.array(labels)


def pixels(file: Path) -> NDArray[np.uint8]:
    """A picture as grey levels, uint8 [height, width]."""
    with PIL.Image.open(file) as opened:
        return np.asarray(opened.convert("L"))


@lru_cache(maxsize=1)
def classifier(documents: Path) -> tuple[Any, float]:
    """The fitted classifier, and the share of held-out images that it reads correctly."""
    images, labels = labelled(documents, "train")
    model = SVC(C=10.0, gamma="scale").fit(images.reshape(len(images), -1) / 255.0, labels)
    images, labels = labelled(documents, "validation")
    return model, float(model.score(images.reshape(len(images), -1) / 255.0, labels))


def digit_of(prompt: str) -> int:
    """The digit that a prompt names.

    Raises:
        ValueError: it names none, or several.
    """
    found = [WORDS.index(word) for word in prompt.lower().split() if word in WORDS]
    if len(found) != 1:
        raise ValueError(f"the prompt {prompt!r} does not name one digit; write e.g. 'draw a seven'")
    return found[0]


def recognise(documents: Path, asked: Sequence[tuple[str, NDArray[np.uint8] | None]]) -> dict[str, Any]:
    """Classify generated digits.

    Args:
        documents: folder of write_documents.py.
        asked: a prompt that names one digit, and the picture [8, 8], brightness 0..255; None: no picture was generated,
            which counts as wrong.

    Returns:
        `asked`, `right` and `share` of what is read as requested, `by_word` the same by word, and `ceiling`, the share
        of held-out real digits that the classifier reads correctly.

    Raises:
        ValueError: there are none, a prompt names no digit or several, or a picture has another size.
    """
    if not asked:
        raise ValueError("there is nothing to recognise: draw digits first")
    wanted = np.array([digit_of(prompt) for prompt, _ in asked])
    drawn = [np.zeros((EDGE, EDGE), np.uint8) if picture is None else picture for _, picture in asked]
    for picture in drawn:
        if picture.shape != (EDGE, EDGE):
            raise ValueError(f"a picture of {' x '.join(map(str, picture.shape))} pixels is no digit of 8 x 8")
    model, ceiling = classifier(documents)
    read = model.predict(np.stack(drawn).reshape(len(drawn), -1) / 255.0)
    right = (read == wanted) & np.array([picture is not None for _, picture in asked])
    by_word = {
        WORDS[digit]: {"asked": int((wanted == digit).sum()), "right": int(right[wanted == digit].sum())}
        for digit in sorted(set(wanted.tolist()))
    }
    share = float(right.mean())
    return {"asked": len(asked), "right": int(right.sum()), "share": share, "ceiling": ceiling, "by_word": by_word}


def drawings(samples: Path) -> list[tuple[str, NDArray[np.uint8] | None]]:
    """Prompts and first pictures in the output of `mmscale sample --json`."""
    try:
        asked = [
            (one["prompt"], [Path(piece["image"]) for piece in one["pieces"] if "image" in piece])
            for one in bounded.read_object(samples, most=1 << 28)["samples"]
        ]
    except bounded.BAD_CONTENT as error:
        raise ValueError(f"{samples} is no output of `mmscale sample --json`: {error}") from error
    return [(prompt, pixels(files[0]) if files else None) for prompt, files in asked]


def main(arguments: list[str]) -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", type=Path, help="folder of write_documents.py")
    parser.add_argument("samples", type=Path, help="output of `mmscale sample --json`")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with the counts of each word")
    asked = parser.parse_args(arguments)
    try:
        found = recognise(asked.documents, drawings(asked.samples))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if asked.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write(
            f"{found['right']} of {found['asked']} drawn digits ({found['share']:.1%}) are read as asked by a "
            f"classifier that reads {found['ceiling']:.1%} of real ones right\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
