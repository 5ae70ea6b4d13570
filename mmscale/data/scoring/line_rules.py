"""Text quality by rules about lines, without a model.

As in Sharma et al. 2024 (2405.01582) a document's score is the mean of its lines' scores, weighted by words, and a
line's score is the weighted share of the rules that it follows. In the paper a rule's weight is the decrease of a
language model's perplexity on the lines that follow it; without such measurements all rules have the same weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_LETTERS = re.compile(r"[^\W\d_]")
_STOP_WORDS = frozenset(
    (
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "a",
        "in",
        "is",
        "it",
        "for",
        "on",
        "as",
        "are",
        "was",
        "this",
        "by",
        "or",
        "an",
        "at",
        "from",
    )
)

RULES: dict[str, Callable[[str], bool]] = {
    "starts with a capital letter, a number or a quotation mark": lambda line: bool(
        re.match(r"[\"'“(]?[^\W_a-z]", line)
    ),
    "ends with a sign that ends a sentence": lambda line: line[-1:] in ".!?\"'”)。！？",
    "has five words or more": lambda line: len(line.split()) >= 5,
    "is mostly letters": lambda line: 2 * len(_LETTERS.findall(line)) > len(line),
    "is not all capitals": lambda line: not line.isupper(),
    "has no braces or markup": lambda line: not re.search(r"[{}<>\\|]", line),
    "has a common word": lambda line: not _STOP_WORDS.isdisjoint(line.casefold().split()),
    "repeats no word more than a third of the time": lambda line: _most(line.split()) <= max(1, len(line.split()) // 3),
}


def quality(text: str, weights: Mapping[str, float] | None = None) -> float:
    """A number from 0 to 1; 1 for a text without words, because a picture alone violates no rule.

    Args:
        text: of a document.
        weights: of the rules; a missing one has weight 0. Default: all have the same.
    """
    given = dict.fromkeys(RULES, 1.0) if weights is None else weights
    total = sum(given.values())
    found, words = 0.0, 0
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped:
            continue
        own = len(stripped.split())
        followed = sum(weight for name, weight in given.items() if RULES[name](stripped))
        found, words = found + own * followed / total, words + own
    return found / words if words else 1.0


def _most(words: list[str]) -> int:
    """How often the most frequent word occurs."""
    return max((words.count(word) for word in set(words)), default=0) if len(words) < 200 else 1
