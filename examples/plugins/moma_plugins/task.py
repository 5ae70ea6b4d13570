"""Minimal pairs: how often the model finds the right one of two sentences more likely."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.extend import Scorer, TaskRun

PAIRS = (
    ("the cat sleeps on the mat", "the mat cat on sleeps the"),
    ("she has two apples", "she have two apples"),
)


class MinimalPairs:
    """The task.

    Args:
        run: the model's settings and tokenizers.
        pairs: the right sentence of each pair, then the wrong one.
    """

    def __init__(self, run: TaskRun, *, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
        self.run, self.pairs = run, pairs

    def __call__(self, scorer: Scorer) -> dict[str, float]:
        """Share of pairs whose right sentence has the higher log-likelihood."""
        documents = [self.run.encode(sentence) for pair in self.pairs for sentence in pair]
        scores = [
            sum(float(row[token]) for row, token in zip(log_p, document[1:], strict=False))
            for log_p, document in zip(scorer.log_probabilities(documents), documents, strict=True)
        ]
        right = sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True))
        return {"minimal_pairs": right / len(self.pairs)}
