"""The types of rules between settings and of their problems. The rules are in */rules.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmscale.config.schema import Config
from mmscale.errors import ConfigError


class Problem(NamedTuple):
    """A violated rule: cause and remedy."""

    cause: str
    remedy: str


Rule = Callable[[Config], Iterator[Problem]]


def as_error(problems: Sequence[Problem]) -> ConfigError:
    """One error for all problems: the first gives its cause and remedy, the others are further lines of the cause."""
    first, *others = problems
    lines = [first.cause, *(f"also: {problem.cause}; {problem.remedy}" for problem in others)]
    return ConfigError("\n".join(lines), remedy=first.remedy)
