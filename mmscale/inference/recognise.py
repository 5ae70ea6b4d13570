"""Recognises digits in generated pictures with a small classifier fitted on real ones.

For the quickstart's digits only: it measures whether generation works at all, not the quality of a picture. The
classifier reads 99.0 % of held-out real digits correctly, so most errors on generated ones are the generator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.built_in.digits import WORDS, labelled
from mmscale.errors import UsageError


@dataclass(frozen=True)
class Recognition:
    """The result for generated digits.

    Attributes:
        asked: number of requested digits.
        right: how many of them are read as requested.
        ceiling: share of held-out real digits that the classifier reads correctly.
        by_word: for each requested word, `(asked, right)`.
    """

    asked: int
    right: int
    ceiling: float
    by_word: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        """Share that is read as requested."""
        return self.right / self.asked


def recognise(asked: Sequence[tuple[str, NDArray[np.uint8] | None]]) -> Recognition:
    """Classify generated digits.

    Args:
        asked: a prompt that names one digit, and the picture [8, 8] or [8, 8, 1], brightness 0..255; None: no picture
            was generated, which counts as wrong.

    Raises:
        UsageError: there are none, a prompt names no digit or several, or a picture has another size.
    """
    if not asked:
        raise UsageError("there is nothing to recognise", remedy='draw digits: --prompt "draw a seven"')
    wanted = [digit_of(prompt) for prompt, _ in asked]
    pictures = [np.zeros((8, 8), np.uint8) if drawn is None else drawn.squeeze() for _, drawn in asked]
    for picture in pictures:
        if picture.shape != (8, 8):
            raise UsageError(
                f"a picture of {' x '.join(map(str, picture.shape))} is no digit of 8 x 8",
                remedy="recognition is for the quickstart's digits",
            )
    model, ceiling = _classifier()
    read = model.predict(np.stack(pictures).reshape(len(pictures), -1) / 255.0)
    there = np.array([drawn is not None for _, drawn in asked])
    right = (read == np.array(wanted)) & there
    by_word = {
        WORDS[digit]: (wanted.count(digit), int(right[np.array(wanted) == digit].sum()))
        for digit in sorted(set(wanted))
    }
    return Recognition(len(asked), int(right.sum()), ceiling, by_word)


def digit_of(prompt: str) -> int:
    """The digit that a prompt names.

    Raises:
        UsageError: it names none, or several.
    """
    found = [WORDS.index(word) for word in prompt.lower().split() if word in WORDS]
    if len(found) != 1:
        raise UsageError(f"the prompt {prompt!r} does not name one digit", remedy='write e.g. "draw a seven"')
    return found[0]


@lru_cache(maxsize=1)
def _classifier() -> tuple[Any, float]:
    from sklearn.svm import SVC  # a second of imports that nothing else here needs

    images, labels = labelled(held_out=False)
    model = SVC(C=10.0, gamma="scale").fit(images.reshape(len(images), -1) / 255.0, labels)
    images, labels = labelled(held_out=True)
    return model, float(model.score(images.reshape(len(images), -1) / 255.0, labels))
