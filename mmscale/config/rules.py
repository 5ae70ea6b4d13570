"""Checks rules between settings and reports every violated rule at once.

The rules of a topic are in its folder, beside the settings: optim/rules.py and optim/schema.py. Single values are
checked by the schemas. A comment next to each rule gives its reason.
"""

from __future__ import annotations

from mmscale.config.auxiliary import rules as auxiliary
from mmscale.config.checkpoint import rules as checkpoint
from mmscale.config.data import rules as data
from mmscale.config.experts import rules as experts
from mmscale.config.model import rules as model
from mmscale.config.objective import rules as objective
from mmscale.config.optim import rules as optim
from mmscale.config.parallel import rules as parallel
from mmscale.config.precision import rules as precision
from mmscale.config.problem import Problem, Rule, as_error
from mmscale.config.resilience import rules as resilience
from mmscale.config.schema import Config
from mmscale.config.sft import rules as sft
from mmscale.config.train import rules as train
from mmscale.config.vocab import rules as vocab

__all__ = ["Problem", "as_error", "check", "violations"]


def violations(config: Config, *, world_size: int | None = None) -> list[Problem]:
    """All violated rules; those about the number of ranks only if `world_size` is known."""
    problems = [problem for rule in _RULES for problem in rule(config)]
    if world_size is not None:
        problems += parallel.world(config, world_size)
    return problems


def check(config: Config, *, world_size: int | None = None) -> None:
    """Check every rule between settings.

    Args:
        config: a configuration whose single values are valid.
        world_size: number of ranks; None while it is not known.

    Raises:
        ConfigError: at least one rule is violated.
    """
    problems = violations(config, world_size=world_size)
    if problems:
        raise as_error(problems)


_TOPICS = (
    vocab,
    model,
    experts,
    parallel,
    train,
    objective,
    optim,
    auxiliary,
    sft,
    resilience,
    data,
    precision,
    checkpoint,
)
_RULES: tuple[Rule, ...] = tuple(rule for topic in _TOPICS for rule in topic.RULES)
