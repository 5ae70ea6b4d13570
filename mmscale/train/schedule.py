"""Learning rate as a pure function of the step: nothing to save, nothing to restore.

Shapes of decay as in Megatron-LM, torchtitan (WSD) and the power scheduler (arXiv 2408.13359).
"""

from __future__ import annotations

import math

from mmscale.config import OptimConfig


def learning_rate(config: OptimConfig, *, step: int, steps: int, tokens_per_step: int) -> float:
    """Learning rate of optimizer step number `step` (from 1).

    Args:
        config: schedule and its numbers.
        step: the step that is about to be taken, from 1.
        steps: steps of the whole run; the schedule ends there.
        tokens_per_step: tokens of an optimizer step (power schedule).
    """
    peak, floor = config.lr, config.min_lr
    if step <= config.warmup:
        return peak * step / config.warmup
    span = max(1, steps - config.warmup)
    progress = min(1.0, (step - config.warmup) / span)
    if config.schedule == "constant":
        return peak
    if config.schedule == "linear":
        return floor + (peak - floor) * (1.0 - progress)
    if config.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "inverse_sqrt":
        start = max(1, config.warmup)
        return max(floor, peak * math.sqrt(start / step))
    decay = config.decay if config.decay is not None else max(1, steps // 10)
    plateau_end = steps - decay
    stable = peak
    if config.schedule == "power":
        tokens = min(step, plateau_end) * tokens_per_step
        stable = min(peak, peak * (max(tokens, 1) / config.power_tokens) ** config.power_exponent)
    if step <= plateau_end or decay == 0:
        return max(floor, stable)
    left = max(0.0, (steps - step) / decay)
    return floor + (max(floor, stable) - floor) * left
