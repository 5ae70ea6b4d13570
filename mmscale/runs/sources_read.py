"""How often a run has read each of its data sets, and how often it will have: from the start events of its attempts.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmscale.runs.events import BEGINS


@dataclass(frozen=True)
class SourceRead:
    """A data set of a run.

    Attributes:
        path: its folder, as the run found it.
        tokens: of a pass, by modality.
        done: passes at the last step.
        planned: passes at the end of the run.
        max_epochs: its limit of passes; None: none.
        repeated: share of its documents that equal an earlier one; None: unknown.
    """

    path: str
    tokens: dict[str, int]
    done: float
    planned: float
    max_epochs: int | None = None
    repeated: float | None = None

    @property
    def tokens_done(self) -> int:
        """Tokens that were read, in all modalities: an estimate, because passes are interpolated between some steps."""
        return round(self.done * sum(self.tokens.values()))


def sources_read(events: Iterable[Mapping[str, Any]], *, step: int) -> list[SourceRead]:
    """The data sets of a run's latest attempt in their order; empty if an older version wrote its events.

    Args:
        events: of the run.
        step: the last one (runs/last_step.py).
    """
    listed = [event["sources"] for event in events if event.get("event") in BEGINS and event.get("sources")]
    found = []
    for source in listed[-1] if listed and isinstance(listed[-1], list) else []:
        try:
            passes = [(int(at), float(number)) for at, number in source["passes"]]
            if not all(0.0 <= number < math.inf for _, number in passes):
                return []
            tokens = {str(name): int(number) for name, number in source["tokens"].items()}
            limit = source.get("max_epochs")
            planned = passes[-1][1]
            again = source.get("repeated")
            found.append(
                SourceRead(
                    str(source["path"]),
                    tokens,
                    _at(passes, step),
                    planned,
                    None if limit is None else int(limit),
                    None if again is None else float(again),
                )
            )
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
            return []  # not written by a run
    return found


def _at(passes: Sequence[tuple[int, float]], step: int) -> float:
    """Passes at a step, on a straight line between its neighbours."""
    before = passes[0]
    for after in passes:
        if after[0] >= step:
            share = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 1.0
            return before[1] + max(0.0, share) * (after[1] - before[1])
        before = after
    return passes[-1][1]
