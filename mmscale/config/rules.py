"""Checks rules between settings and reports every violated rule at once.

Single values are checked by schema.py. Rules of larger sections are in rules_*.py. A comment next to each rule gives
its reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from mmscale.config.checkpoint import rules as checkpoint
from mmscale.config.data import rules as data
from mmscale.config.derived import held_out_figures
from mmscale.config.experts import rules as experts
from mmscale.config.model import rules as model
from mmscale.config.optim import rules as optim
from mmscale.config.parallel import recompute
from mmscale.config.parallel import rules as parallel
from mmscale.config.precision import rules as precision
from mmscale.config.problem import Problem, Rule, as_error
from mmscale.config.schema import Config

__all__ = ["Problem", "as_error", "check", "violations"]

_SHORTEST_WINDOW = 8  # steps; with fewer, the median absolute deviation is mostly noise


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
            "model.auxiliary.mode = stage is set by `mmscale train CONFIG --stage auxiliary`",
            "set it to off and run that command after the main run, or set it to joint",
        )
    for key, given in (
        ("model.auxiliary.mode = joint", model.auxiliary.mode == "joint"),
        ("model.experts.threshold_decay", model.experts.threshold_decay > 0.0),
    ):
        if given and not model.routes:
            yield Problem(f"{key} is set, but a dense model without Mixture-of-Depths has no routing", "remove it")
    if model.experts.threshold_decay >= 1.0:
        yield Problem(
            "model.experts.threshold_decay = 1 keeps the initial value forever", "use a value below 1, e.g. 0.99"
        )
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
            f"resilience.anomaly.window = {anomaly.window} steps are too few to estimate the normal range",
            f"use at least {_SHORTEST_WINDOW}",
        )


def _memory(config: Config) -> Iterator[Problem]:
    if config.resilience.memory_group < 2:
        yield Problem(
            f"resilience.memory_group = {config.resilience.memory_group} leaves no other rank to keep a rank's parity",
            "use 2 (a mirror) or more; resilience.memory_every=0 turns the memory tier off",
        )


def _held_out(config: Config) -> Iterator[Problem]:
    """Settings that use held-out losses need evaluations that measure them; questions need whole sequences."""
    if config.train.tasks and config.parallel.cp > 1:
        yield Problem(
            "train.tasks is set, but parallel.cp > 1 splits the sequences of questions over ranks",
            "leave it out and ask checkpoints: mmscale eval RUN --task FILE",
        )
    stop = config.train.stop_when
    wanted = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.stop_when.metric": None if stop is None else stop.metric,
    }
    known = held_out_figures(config)
    for key, metric in wanted.items():
        if metric is None:
            continue
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            yield Problem(
                f"{key} = {metric} is nothing that this run measures", f"{meant}choose one of {', '.join(known)}"
            )
        if config.train.eval_every == 0:
            yield Problem(
                f"{key} is set, but train.eval_every is 0: the run is evaluated at its end only",
                "set train.eval_every, e.g. to a twentieth of train.steps",
            )


_RULES: tuple[Rule, ...] = (
    *model.RULES,
    *parallel.RULES,
    *recompute.RULES,
    *experts.RULES,
    _batches,
    *optim.RULES,
    _auxiliary,
    _anomaly,
    _memory,
    _held_out,
    *data.RULES,
    *precision.RULES,
    *checkpoint.RULES,
)
