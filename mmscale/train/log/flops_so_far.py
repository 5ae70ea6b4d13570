"""Model FLOPs of a run so far, for `flops` in metrics.jsonl, when attempts differ in the FLOPs of a token. No torch.

They differ after a change of `model.seq_length`, and in a run of `ckpt upcycle`, which counts the tokens of its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.runs.json_lines import parse_line
from mmscale.runs.metrics import METRICS

_TAIL = 8 << 20  # bytes at the end of the file: an attempt resumes from one of the newest steps


class FlopsSoFar:
    """Adds up the FLOPs of the tokens between logged steps.

    Args:
        run: the folder with metrics.jsonl.
        per_token: training FLOPs per token in this attempt.
    """

    def __init__(self, run: Path, *, per_token: float) -> None:
        self._run, self._per_token = run, per_token
        self._known: tuple[int, float] | None = None  # tokens and FLOPs up to a step

    def at(self, step: int, *, tokens: int, of_step: int) -> float:
        """FLOPs up to a logged step.

        Args:
            step: its number, from 1; steps come in order, except after a roll-back.
            tokens: that the model was trained on up to it, with those before the run began.
            of_step: tokens of the step itself.
        """
        if self._known is None:
            begun = (tokens - of_step, 0.0) if step == 1 else (0, 0.0)
            self._known = _logged_before(step, self._run) or begun
        before, flops = self._known
        self._known = tokens, flops + (tokens - before) * self._per_token
        return self._known[1]


def _logged_before(step: int, run: Path) -> tuple[int, float] | None:
    """Tokens and FLOPs of the newest line of an earlier step; None: there is none."""
    found = None
    for line in _last_lines(run / METRICS):
        tokens, flops = line.get("tokens"), line.get("flops")
        if line.get("step", step) < step and isinstance(tokens, int) and isinstance(flops, int | float):
            found = tokens, float(flops)
    return found


def _last_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL))
            for line in bounded.lines(opened):
                if (record := parse_line(line)) is not None:
                    yield record
    except OSError:
        return
