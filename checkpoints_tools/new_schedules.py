"""Schedules of a new run that begins with another run's weights: they count steps from its own beginning. No torch."""

from __future__ import annotations

from typing import Any

from mmscale.config import Config


def restarted(config: Config) -> Config:
    """The configuration of a run with its schedule at the start, in a new run of as many steps (`begun_again`)."""
    return Config.model_validate(begun_again(config.model_dump(mode="json"), config, done=0))


def begun_again(settings: dict[str, Any], old: Config, *, done: int) -> dict[str, Any]:
    """The settings with the learning-rate schedule at its start, and with weights of data as they are after `done`.

    Args:
        settings: of the new run, plain JSON, with its `train.steps`.
        old: the configuration of the source.
        done: steps of the source that the new run's steps follow; 0: it follows none.

    Returns:
        `optim.restart` is 0. Phases of the learning rate and weights in `data.blend` that change later do so as many
        steps earlier; those that no step would follow are left out.
    """
    steps = settings["train"]["steps"]
    phases = [phase | {"start": phase["start"] - done} for phase in settings["optim"]["phases"]]
    optim = settings["optim"] | {"restart": 0, "phases": [one for one in phases if 0 < one["start"] < steps]}
    blend = settings["data"]["blend"]
    if done and len(blend) == len(old.data.blend):
        weights = [_later(source.weight, done) for source in old.data.blend]
        blend = [one | {"weight": weight} for one, weight in zip(blend, weights, strict=True)]
    return settings | {"optim": optim, "data": settings["data"] | {"blend": blend}}


def _later(weight: float | dict[int, float], done: int) -> float | dict[int, float]:
    if not isinstance(weight, dict):
        return weight
    now = weight[max(step for step in weight if step <= done)]
    return {0: now} | {step - done: value for step, value in weight.items() if step > done}
