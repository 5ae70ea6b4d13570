"""Rules between settings, in words. Every violated rule is reported at once.

Shapes of single values are schema.py's; rules of larger sections are in the rules_*.py beside this file. Why a rule
exists stands next to it.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import (
    rules_compute,
    rules_data,
    rules_model,
    rules_optim,
    rules_parallel,
    rules_precision,
    rules_recompute,
)
from mmscale.config.problem import Problem, Rule, as_error
from mmscale.config.schema import Config

__all__ = ["Problem", "as_error", "check", "violations"]

_SHORTEST_WINDOW = 8  # steps; the median absolute deviation of fewer is mostly chance


def violations(config: Config, *, world_size: int | None = None) -> list[Problem]:
    """All violated rules; those about the number of ranks only if `world_size` is known."""
    problems = [problem for rule in _RULES for problem in rule(config)]
    if world_size is not None:
        problems += rules_parallel.world(config, world_size)
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


def _batches(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by train.micro_batch_size = "
            f"{train.micro_batch_size}",
            "change one of them",
        )


def _auxiliary(config: Config) -> Iterator[Problem]:
    model, stage = config.model, config.auxiliary
    if model.auxiliary.mode == "stage":
        yield Problem(
            "model.auxiliary.mode = stage is what `mmscale train CONFIG --stage auxiliary` sets by itself",
            "write off and run that command after the main run, or write joint",
        )
    for key, given in (
        ("model.auxiliary.mode = joint", model.auxiliary.mode == "joint"),
        ("model.experts.threshold_decay", model.experts.threshold_decay > 0.0),
    ):
        if given and not model.routes:
            yield Problem(f"{key} is set, but a dense model without Mixture-of-Depths routes nothing", "remove it")
    if model.experts.threshold_decay >= 1.0:
        yield Problem("model.experts.threshold_decay = 1 never moves from its start", "use a value below 1, e.g. 0.99")
    size = stage.global_batch_size or config.train.global_batch_size
    micro = stage.micro_batch_size or config.train.micro_batch_size
    if size % micro:
        yield Problem(
            f"auxiliary: the global batch of {size} sequences is not divisible by micro-batches of {micro}",
            "change auxiliary.global_batch_size or auxiliary.micro_batch_size",
        )


def _anomaly(config: Config) -> Iterator[Problem]:
    anomaly = config.resilience.anomaly
    if anomaly.window < _SHORTEST_WINDOW:
        yield Problem(
            f"resilience.anomaly.window = {anomaly.window} steps say little about what is usual",
            f"use at least {_SHORTEST_WINDOW}",
        )


def _memory(config: Config) -> Iterator[Problem]:
    if config.resilience.memory_group < 2:
        yield Problem(
            f"resilience.memory_group = {config.resilience.memory_group} leaves nobody to keep a rank's parity",
            "use 2 (a mirror) or more; resilience.memory_every=0 turns the memory tier off",
        )


_RULES: tuple[Rule, ...] = (
    *rules_model.RULES,
    *rules_parallel.RULES,
    *rules_recompute.RULES,
    *rules_compute.RULES,
    _batches,
    *rules_optim.RULES,
    _auxiliary,
    _anomaly,
    _memory,
    *rules_data.RULES,
    *rules_precision.RULES,
)
