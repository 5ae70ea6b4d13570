"""What a rule between settings reports, and what a rule is. The rules themselves are in rules.py and rules_*.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmscale.config.schema import Config
from mmscale.errors import ConfigError


class Problem(NamedTuple):
    """A violated rule: what is wrong and what helps."""

    cause: str
    remedy: str


Rule = Callable[[Config], Iterator[Problem]]


def as_error(problems: Sequence[Problem]) -> ConfigError:
    """One error for all problems: the first is its cause and remedy, each other one is a further line of the cause."""
    first, *others = problems
    lines = [first.cause, *(f"also: {problem.cause}; {problem.remedy}" for problem in others)]
    return ConfigError("\n".join(lines), remedy=first.remedy)
