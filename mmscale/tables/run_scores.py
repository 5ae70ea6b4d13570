"""Scores that a run's checkpoint gives to documents (`mmscale data score --by NAME:RUN`).

mmscale/inference/score_documents.py computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.tables.table import Choice, Table


@dataclass(frozen=True, kw_only=True)
class RunScore(Choice):
    """A score.

    Attributes:
        masks: whether it compares with a pass in which the retrieval heads are masked.
    """

    masks: bool = False


RUN_SCORES: Table[RunScore] = Table(
    "Scores by a run",
    ("data score --by",),
    {
        "perplexity": RunScore(meaning="exp of the mean loss of a token"),
        "memorised": RunScore(
            meaning="share of the tokens that are the most likely ones in their places, given the true earlier tokens "
            "(Tirumala et al. 2022, 2205.10770)"
        ),
        "influence": RunScore(
            meaning="relative increase of the loss when the retrieval heads are masked (AttentionInfluence, Hua et al. "
            "2025, 2505.07293)",
            masks=True,
        ),
    },
)
