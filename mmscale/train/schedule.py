"""Learning rate as a pure function of the step and of the tokens consumed: nothing to save, nothing to restore.

Shapes of decay as in Megatron-LM, torchtitan (WSD) and the power scheduler (arXiv 2408.13359). A decay reaches `min_lr`
after the last step and not at it: with `min_lr: 0` that step would learn nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mmscale.config import Config, OptimConfig
from mmscale.config.derived import tokens_per_step


def learning_rate(config: OptimConfig, *, step: int, steps: int, tokens: int) -> float:
    """Learning rate of optimizer step number `step` (from 1).

    Args:
        config: schedule and its numbers.
        step: the step that is about to be taken, from 1.
        steps: steps of the whole run; the schedule ends after them.
        tokens: tokens trained on before this step (schedule power).
    """
    step, steps = max(1, step - config.restart), max(1, steps - config.restart)
    if step <= config.warmup:
        return config.lr * step / config.warmup
    return _AFTER_WARMUP[config.schedule](config, step, steps, tokens)


def _constant(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    return config.lr


def _linear(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    return _between(config.min_lr, config.lr, 1.0 - _progress(config, step, steps))


def _cosine(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    return _between(config.min_lr, config.lr, 0.5 * (1.0 + math.cos(math.pi * _progress(config, step, steps))))


def _inverse_sqrt(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    return max(config.min_lr, config.lr * math.sqrt(max(1, config.warmup) / step))


def _wsd(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    return _between(config.min_lr, config.lr, _final_decay(config, step, steps))


def _power(config: OptimConfig, step: int, steps: int, tokens: int) -> float:
    stable = min(config.lr, config.lr * (max(tokens, 1) / config.power_tokens) ** config.power_exponent)
    return _between(config.min_lr, max(config.min_lr, stable), _final_decay(config, step, steps))


_AFTER_WARMUP: dict[str, Callable[[OptimConfig, int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "power": _power,
}


def _between(floor: float, peak: float, share: float) -> float:
    return floor + (peak - floor) * share


def _progress(config: OptimConfig, step: int, steps: int) -> float:
    """How much of the decay from the end of the warm-up on is over: 0 at its last step, 1 after the run's last."""
    return min(1.0, (step - config.warmup) / (max(0, steps - config.warmup) + 1))


def _final_decay(config: OptimConfig, step: int, steps: int) -> float:
    """What is left of the decay over the last steps: 1 before it, 0 after the run's last step."""
    decay = config.decay if config.decay is not None else max(1, steps // 10)
    return 1.0 if decay == 0 else min(1.0, max(0.0, (steps + 1 - step) / (decay + 1)))


def around(old: Config, new: Config, *, step: int) -> tuple[float, float]:
    """Learning rates on both sides of a change of settings.

    Args:
        old: the configuration that trained up to here.
        new: the one that goes on.
        step: steps done, at least 1.

    Returns:
        What `old` gives for the next step, or gave for its last one if it is done; what `new` gives for the next step.
    """
    tokens = step * tokens_per_step(old)  # near enough to compare both
    before = learning_rate(old.optim, step=min(step + 1, old.train.steps), steps=old.train.steps, tokens=tokens)
    return before, learning_rate(new.optim, step=step + 1, steps=new.train.steps, tokens=tokens)
