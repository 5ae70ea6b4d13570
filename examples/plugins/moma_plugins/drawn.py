"""How often a drawn picture is what the prompt says, by a classifier of one's own: here, whether it is bright."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mmscale.extend import Scorer, TaskRun

PROMPTS = {"draw a one": "dark", "draw an eight": "bright"}


def classify(pixels: NDArray[Any], *, threshold: float) -> str:
    """A picture's class. Put your own model here: it gets uint8 [height, width, channels]."""
    return "bright" if pixels.mean() > threshold else "dark"


class DrawnClasses:
    """The task.

    Args:
        run: the model's settings and tokenizers.
        prompts: texts that the training documents put before a picture, and the class that each asks for.
        count: pictures of each prompt.
        threshold: of the classifier.
    """

    def __init__(
        self, run: TaskRun, *, prompts: Mapping[str, str] = PROMPTS, count: int = 4, threshold: float = 40.0
    ) -> None:
        self.run, self.prompts, self.count, self.threshold = run, prompts, count, threshold

    def __call__(self, scorer: Scorer) -> dict[str, float]:
        """Share of drawings that the classifier puts into the class that was asked for."""
        wanted = [(prompt, name) for prompt, name in self.prompts.items() for _ in range(self.count)]
        drawings = self.run.draw(scorer, [prompt for prompt, _ in wanted])
        found = [classify(pixels, threshold=self.threshold) for pixels in drawings]
        right = sum(one == name for one, (_, name) in zip(found, wanted, strict=True))
        return {"drawn_classes": right / len(wanted)}
