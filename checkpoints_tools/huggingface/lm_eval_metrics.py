"""The functions of the tasks that lm_eval_tasks.py writes: a copy of this file is in their folder.

lm-evaluation-harness imports it without mmscale. It needs `datasets`, as the harness does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Sums = Sequence[tuple[float, int]]


def documents(file: str, **_: Any) -> dict[str, Any]:
    """The requests of a task, as its only split.

    Args:
        file: JSONL next to this file.
        _: metadata of the task and of the model, which the harness passes too.
    """
    from datasets import load_dataset

    return {"test": load_dataset("json", data_files=str(Path(__file__).with_name(file)), split="train")}


def process_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-probability of a continuation [nats] and the number of its tokens."""
    log_p, _ = results[0]
    return {"token_loss": (log_p, doc["tokens"]), "token_perplexity": (log_p, doc["tokens"])}


def token_loss(items: Sums) -> float:
    """Mean loss of a token over all continuations [nats]."""
    return -sum(log_p for log_p, _ in items) / sum(tokens for _, tokens in items)


def token_perplexity(items: Sums) -> float:
    """Perplexity of a token over all continuations."""
    return math.exp(token_loss(items))
