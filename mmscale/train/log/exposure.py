"""How much data a run sees: passes over each source, tokens, tokens per parameter. One line, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.config import Config
from mmscale.data.prepared.selection import read_selection
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.source import Source
from mmscale.train.log.progress_lines import count


def exposure(config: Config, data: Mixture, *, parameters: Mapping[str, Any]) -> str:
    """`600 steps = 5.4 passes over data/icons; 2.1M tokens, 12 per parameter (31 per active one)`.

    Args:
        config: of the stage.
        data: its training stream.
        parameters: `total` and `active`, as in `mmscale.plan.plan`.
    """
    steps, sequences = config.train.steps, config.train.steps * config.train.global_batch_size
    read = [
        (source.folder, passes, _tokens(source))
        for source, passes in zip(data.sources, data.passes(sequences), strict=True)
        if passes > 0
    ]
    shown = ", ".join(f"{_rounded(passes)} passes over {folder}" for folder, passes, _ in read)
    tokens = sum(passes * size for _, passes, size in read)
    total, active = (float(parameters.get(name, 0)) for name in ("total", "active"))
    ratio = f", {_rounded(tokens / total)} per parameter" if total else ""
    if active and active != total:
        ratio += f" ({_rounded(tokens / active)} per active one)"
    return f"{steps:,} {'step' if steps == 1 else 'steps'} = {shown}; {count(tokens)} tokens{ratio}"


def _tokens(source: Source) -> float:
    """Tokens of one pass. Document weights omit some documents and repeat others."""
    chosen = read_selection(source.folder) if source.selection else None
    return float(source.tokens) if chosen is None else sum(chosen.tokens.values())


def _rounded(number: float) -> str:
    """A number with two digits if it is small, otherwise a whole number."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
