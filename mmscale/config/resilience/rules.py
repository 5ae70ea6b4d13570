"""Rules about recovery from faults."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

_SHORTEST_WINDOW = 8  # steps; with fewer, the median absolute deviation is mostly noise


def _anomaly(config: Config) -> Iterator[Problem]:
    anomaly = config.resilience.anomaly
    if anomaly.window < _SHORTEST_WINDOW:
        yield Problem(
            f"resilience.anomaly.window = {anomaly.window} steps are too few to estimate the normal range",
            f"use at least {_SHORTEST_WINDOW}",
        )


def _memory(config: Config) -> Iterator[Problem]:
    if config.resilience.memory_group < 2:
        yield Problem(
            f"resilience.memory_group = {config.resilience.memory_group} leaves no other rank to keep a rank's parity",
            "use 2 (a mirror) or more; resilience.memory_every=0 turns the memory tier off",
        )


RULES: tuple[Rule, ...] = (_anomaly, _memory)
