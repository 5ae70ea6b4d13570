"""Rules about checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.tables.mirror_urls import problem_of


def _mirror(config: Config) -> Iterator[Problem]:
    url = config.checkpoint.mirror
    problem = None if url is None else problem_of(url, what="checkpoint.mirror")
    if problem is not None:
        yield Problem(problem.cause, problem.remedy)


RULES: tuple[Rule, ...] = (_mirror,)
