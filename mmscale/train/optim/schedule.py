"""Learning-rate schedules: pure functions of the step and of the consumed tokens, so no state has to be saved.

Decays have the shapes of Megatron-LM, torchtitan (WSD) and the power scheduler (arXiv 2408.13359). A decay reaches
`min_lr` one step after the last one: with `min_lr: 0` the last step would otherwise have no effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.config import Config, OptimConfig
from mmscale.config.derived import tokens_per_step
from mmscale.tables import plugins
from mmscale.tables.plugins import PluginError, Use


@dataclass(frozen=True)
class Point:
    """A step after the warm-up, as the input of a schedule.

    Attributes:
        step: the step that is about to be taken, from 1; counted from `optim.restart` on, or from the start of the
            phase of `optim.phases`.
        steps: steps of the run or of the phase, counted likewise; the last step has this number.
        tokens: tokens trained on before this step.
        optim: the settings: `lr`, `min_lr`, `warmup` and the others; of a phase, with its own in their place.
    """

    step: int
    steps: int
    tokens: int
    optim: OptimConfig


def learning_rate(config: OptimConfig, *, step: int, steps: int, tokens: int) -> float:
    """Learning rate of optimizer step number `step` (from 1).

    Args:
        config: schedule and its numbers.
        step: the step that is about to be taken, from 1.
        steps: steps of the whole run; the last schedule ends after them.
        tokens: tokens trained on before this step (schedule power).
    """
    own, start, end, _ = config.span_at(step, steps)
    step, steps = max(1, step - start), max(1, end - start)
    if step <= own.warmup:
        return own.lr * step / own.warmup
    return shape_of(own)(Point(step, steps, tokens, own))


def _constant(at: Point) -> float:
    return at.optim.lr


def _linear(at: Point) -> float:
    return _between(at.optim.min_lr, at.optim.lr, 1.0 - _progress(at))


def _cosine(at: Point) -> float:
    return _between(at.optim.min_lr, at.optim.lr, 0.5 * (1.0 + math.cos(math.pi * _progress(at))))


def _inverse_sqrt(at: Point) -> float:
    return max(at.optim.min_lr, at.optim.lr * math.sqrt(max(1, at.optim.warmup) / at.step))


def _wsd(at: Point) -> float:
    return _between(at.optim.min_lr, at.optim.lr, _final_decay(at))


def _power(at: Point) -> float:
    stable = min(at.optim.lr, at.optim.lr * (max(at.tokens, 1) / at.optim.power_tokens) ** at.optim.power_exponent)
    return _between(at.optim.min_lr, max(at.optim.min_lr, stable), _final_decay(at))


Shape = Callable[[Point], float]
SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "power": _power,
}


def shape_of(config: OptimConfig) -> Shape:
    """The schedule after the warm-up: a built-in one, or a plug-in.

    Raises:
        PluginError: the plug-in cannot be used.
    """
    if config.schedule in SHAPES:
        return SHAPES[config.schedule]
    key = config.schedule, json.dumps(config.schedule_args, sort_keys=True)
    if key not in _PLUGGED:  # called at every step, so the plug-in is cached
        _PLUGGED[key] = _plugged(config.schedule, config.schedule_args)
    return _PLUGGED[key]


_PLUGGED: dict[tuple[str, str], Shape] = {}


def _plugged(name: str, arguments: Mapping[str, Any]) -> Shape:
    shape: Shape = plugins.make(Use("schedule", "optim.schedule", name, arguments))

    def checked(at: Point) -> float:
        rate = float(shape(at))
        if not 0.0 <= rate < math.inf:
            raise PluginError(
                f"optim.schedule: {name} gives the learning rate {rate} for step {at.step}",
                remedy="a schedule gives a finite number that is not negative",
            )
        return rate

    return checked


def _between(floor: float, peak: float, share: float) -> float:
    return floor + (peak - floor) * share


def _progress(at: Point) -> float:
    """Fraction of the decay that is over: 0 at the last step of the warm-up, 1 after the last step of the run."""
    return min(1.0, (at.step - at.optim.warmup) / (max(0, at.steps - at.optim.warmup) + 1))


def _final_decay(at: Point) -> float:
    """Factor of the decay over the last steps: 1 before it, 0 after the run's last step."""
    decay = at.optim.decay if at.optim.decay is not None else max(1, at.steps // 10)
    return 1.0 if decay == 0 else min(1.0, max(0.0, (at.steps + 1 - at.step) / (decay + 1)))


def around(old: Config, new: Config, *, step: int) -> tuple[float, float]:
    """Learning rates before and after a change of settings.

    Args:
        old: the configuration that trained up to here.
        new: the one that resumes.
        step: steps done, at least 1.

    Returns:
        The rate of `old` for the next step, or for its last step if `old` is done; the rate of `new` for the next step.
    """
    tokens = step * tokens_per_step(old)  # accurate enough to compare both
    before = learning_rate(old.optim, step=min(step + 1, old.train.steps), steps=old.train.steps, tokens=tokens)
    return before, learning_rate(new.optim, step=step + 1, steps=new.train.steps, tokens=tokens)
