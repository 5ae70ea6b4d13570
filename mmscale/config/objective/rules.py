"""Rules about the training objective."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config


def _holes(config: Config) -> Iterator[Problem]:
    if config.objective.cm3_rate and not config.vocab.reserved:
        yield Problem(
            f"objective.cm3_rate = {config.objective.cm3_rate:g} needs tokens for holes, which the vocabulary lacks",
            "set vocab.reserved=true and prepare the data with it, or set objective.cm3_rate=0",
        )


RULES: tuple[Rule, ...] = (_holes,)
