"""Rules between settings, in words. Every violated rule is reported at once.

Shapes of single values are schema.py's; rules of larger sections are in the rules_*.py beside this file. Why a rule
exists stands next to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mmscale.config import rules_compute, rules_data, rules_model, rules_parallel, rules_precision
from mmscale.config.problem import Problem, Rule, as_error
from mmscale.config.schema import Config, OptimConfig

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


def _optim(config: Config) -> Iterator[Problem]:
    yield from _optimizer(config.optim, config.train.steps, section="optim", of="train")
    stage = config.auxiliary
    yield from _optimizer(stage.optim, stage.steps, section="auxiliary.optim", of="auxiliary")


def _optimizer(optim: OptimConfig, steps: int, *, section: str, of: str) -> Iterator[Problem]:
    if optim.warmup > steps:
        yield Problem(
            f"{section}.warmup = {optim.warmup} steps is more than {of}.steps = {steps}", "shorten the warm-up"
        )
    if optim.min_lr > optim.lr:
        yield Problem(
            f"{section}.min_lr = {optim.min_lr:g} is above {section}.lr = {optim.lr:g}", f"lower {section}.min_lr"
        )
    if optim.schedule in ("wsd", "power") and optim.decay is not None and optim.warmup + optim.decay > steps:
        yield Problem(
            f"{section}.warmup + {section}.decay = {optim.warmup} + {optim.decay} steps is more than "
            f"{of}.steps = {steps}",
            "shorten one of them",
        )
    for key, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if beta >= 1.0:
            yield Problem(f"{section}.{key} = {beta:g} never forgets, Adam divides by 1 - {key}", "use a value below 1")
    for key, value in optim.model_dump().items():
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(f"{section}.{key} = {value} is not a finite number", "give a finite number")


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
    if not math.isfinite(anomaly.threshold):
        yield Problem(
            f"resilience.anomaly.threshold = {anomaly.threshold} is not a finite number", "give a finite number"
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
    *rules_compute.RULES,
    _batches,
    _optim,
    _auxiliary,
    _anomaly,
    _memory,
    *rules_data.RULES,
    *rules_precision.RULES,
)
