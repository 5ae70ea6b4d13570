"""Ways to draw with a trained model, and the ranking of samples by their likelihood: for decoding*.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoints_tools.huggingface.generator import DecodedSample, Generator
from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind, log_likelihoods

MASK = {"unconditional": "mask"}
PLAIN: dict[str, dict[str, Any]] = {
    "no guidance": {},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 2": {"guidance": 2.0},
    "guidance 3": {"guidance": 3.0},
    "CD-K, k 1, alpha 0.1": {"cd_k": 1, "cd_alpha": 0.1},
    "CD-K, k 4, alpha 0.3": {"cd_k": 4, "cd_alpha": 0.3},
    "CD-K, k 4, alpha 1": {"cd_k": 4, "cd_alpha": 1.0},
}
# For models that were trained with `objective.cm3_rate`.
MASKED = {f"{name} from <mask>": {**way, **MASK} for name, way in PLAIN.items() if way}


def scores(
    model: Generator, samples: Sequence[DecodedSample], *, masked: bool, captions: Sequence[str] | None
) -> np.ndarray:
    """Log likelihoods of the prompts, or of captions, behind what was drawn; [n].

    Args:
        model: that drew.
        samples: n drawings with their prompts.
        masked: the text stands in a hole before the drawing, instead of behind it.
        captions: of the samples; None: their prompts.
    """
    documents = [
        document_behind(
            model.processor, model.encode(one.prompt), one.ids, masked=masked, text=captions and captions[number]
        )
        for number, one in enumerate(samples)
    ]
    return np.array(log_likelihoods(model.model, documents, pad=0))


def shares(right: np.ndarray, ranks: np.ndarray, *, best_of: Sequence[int]) -> dict[int, float]:
    """Share of kept drawings that are read as asked, by the number of samples of which the best is kept.

    Args:
        right: [n], whether a drawing is read as asked.
        ranks: [n], the larger the better.
        best_of: numbers of consecutive samples.
    """
    found = {}
    for number in best_of:
        best = ranks.reshape(-1, number).argmax(axis=1)
        found[number] = float(right.reshape(-1, number)[np.arange(len(best)), best].mean())
    return found
