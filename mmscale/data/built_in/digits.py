"""The built-in real data set: scikit-learn's handwritten digits as caption <-> image documents, and a task on them.

1,797 images of 8x8 pixels with 17 grey levels, in scikit-learn's wheel. About a sixth of the images is held out, the
same share of every class. The same writers occur in both splits, so the task does not measure generalisation to new
writers. This module only makes the documents; they are prepared like any others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmscale.data.documents.schema import Document, Image, Text
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.tasks import TaskItem
from mmscale.errors import ConfigError, DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The word comes last, so that everything before it is the question. "a eight" is wrong English on purpose: "an" would
# give the answer away.
DESCRIBE = ("this is a {}", "it shows a {}", "the digit is {}", "somebody wrote a {}")
DRAW = ("draw a {}", "show me a {}", "write the digit {}", "a picture of a {}")
_SHIFTS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))
_HELD_OUT = 6  # one image in six
TASK = "digit"


@lru_cache(maxsize=1)
def _images() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Images uint8 [1797, 8, 8] (0..255 in 17 steps), labels [1797], held out [1797]."""
    from sklearn.datasets import load_digits  # a second of imports that no other source needs

    digits = load_digits()
    # 0..16 -> 0..255; rounding to 17 grey levels gives the values back exactly
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(len(WORDS)):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda index: _hash("split", index))
        held_out[members[: round(len(members) / _HELD_OUT)]] = True
    return images, labels, held_out


def labelled(*, held_out: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 8, 8] and their digits [n] of one split."""
    images, labels, out = _images()
    return images[out == held_out], labels[out == held_out]


def _hash(purpose: str, index: int) -> int:
    """A number that is independent of the label; the digits are stored in the order 0, 1, .. 9, 0, 1, .."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{index}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class DigitsSlice:
    """Records first..first+count-1 of the digits.

    Record 2k describes an image, record 2k+1 draws it. All images in their original form come first, then shifted
    copies of the training images.

    Attributes:
        augment: shifted copies of each training image, 0..8.
    """

    first: int
    count: int
    augment: int

    @property
    def identity(self) -> str:
        """A hash of the images' content, the templates and the range of records."""
        images, labels, _ = _images()
        content = images.tobytes() + labels.tobytes() + repr((DESCRIBE, DRAW, WORDS, _HELD_OUT)).encode()
        return f"digits:{hashlib.sha256(content).hexdigest()}:{self.augment}:{self.first}+{self.count}"

    def read(self) -> Iterator[Document]:
        """The slice's documents."""
        _, _, held_out = _images()
        training = np.flatnonzero(~held_out)
        for record in range(self.first, self.first + self.count):
            number, draws = divmod(record, 2)
            if number < len(held_out):
                yield _document(number, copy=0, draws=bool(draws))
            else:
                copy, position = divmod(number - len(held_out), len(training))
                yield _document(int(training[position]), copy=copy + 1, draws=bool(draws))


def digit_slices(*, augment: int, slice_records: int) -> list[DigitsSlice]:
    """The whole source in slices.

    Args:
        augment: shifted copies of each training image, 0..8; no two copies of an image are alike.
        slice_records: records of a slice, at most.

    Raises:
        ConfigError: more copies than there are directions.
    """
    if augment > len(_SHIFTS):
        raise ConfigError(f"data.prepare.augment: {augment} copies, there are {len(_SHIFTS)} directions", remedy="0..8")
    _, _, held_out = _images()
    total = 2 * (len(held_out) + augment * int((~held_out).sum()))
    return [DigitsSlice(at, min(slice_records, total - at), augment) for at in range(0, total, slice_records)]


def _document(index: int, *, copy: int, draws: bool) -> Document:
    images, labels, held_out = _images()
    pixels = images[index]
    if copy:
        pixels = _shifted(pixels, *_SHIFTS[(_hash("shift", index) + copy) % len(_SHIFTS)])
    word = WORDS[labels[index]]
    templates = DRAW if draws else DESCRIBE
    caption = templates[(_hash("template", index) + copy) % len(templates)].format(word)
    name = f"digits-{index:04d}-{copy}-{'draw' if draws else 'describe'}"
    image = Image(pixels, name)
    content = (Text(caption), image) if draws else (image, Text(caption))
    return Document(name, content, f"digits:{index}", split="validation" if held_out[index] else "train")


def _shifted(pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """Pixels [8, 8] moved by one pixel; black pixels are moved in, and pixels at the edge are lost."""
    padded = np.pad(pixels, 1)
    height, width = pixels.shape
    return padded[1 - down : 1 - down + height, 1 - right : 1 - right + width]


def digit_task(encoder: DocumentEncoder) -> list[TaskItem]:
    """One question for every held-out image: which digit is it?

    Args:
        encoder: makes ids in the same way as for the training documents.

    Raises:
        DataError: the text tokenizer cannot distinguish the ten words, or a document does not fit.
    """
    _, labels, held_out = _images()
    choices = {template: _choices(encoder, template) for template in DESCRIBE}
    items = []
    for index in np.flatnonzero(held_out):
        document = _document(int(index), copy=0, draws=False)
        (encoded,) = encoder.encode([document])
        if not isinstance(encoded, Encoded):
            raise DataError(f"digits: {encoded.id} was rejected: {encoded.reason}", remedy="raise max_document_tokens")
        template = DESCRIBE[_hash("template", int(index)) % len(DESCRIBE)]
        answer = choices[template][labels[index]]
        end = len(encoded.ids) - 1  # before </s>
        ids = tuple(encoded.ids.tolist())
        assert ids[end - len(answer) : end] == answer
        items.append(TaskItem(ids, (end - len(answer), end), choices[template]))
    return items


def _choices(encoder: DocumentEncoder, template: str) -> tuple[tuple[int, ...], ...]:
    """Ids of the ten words at the end of the template: the rest of the captions after their common beginning."""
    captions = [tuple(encoder.text.encode(template.format(word)).tolist()) for word in WORDS]
    common = 0
    while len({caption[: common + 1] for caption in captions}) == 1:
        common += 1
    choices = tuple(caption[common:] for caption in captions)
    if len(set(choices)) < len(WORDS) or not all(choices):
        raise DataError("digits: the text tokenizer cannot tell the ten words apart", remedy="use another tokenizer")
    return choices
