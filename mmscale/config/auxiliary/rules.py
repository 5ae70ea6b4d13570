"""Rules about the auxiliary routers and their training."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.config.train.rules import stage_batches


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
            what = "token choice is causal as it is" if model.has_experts else "a dense model has no routing"
            yield Problem(f"{key} is set, but without Mixture-of-Depths {what}", "remove it")
    if model.experts.threshold_decay >= 1.0:
        yield Problem(
            "model.experts.threshold_decay = 1 keeps the initial value forever", "use a value below 1, e.g. 0.99"
        )
    yield from stage_batches(config, stage, "auxiliary")


RULES: tuple[Rule, ...] = (_auxiliary,)
