"""Rules about supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.config.train.rules import stage_batches


def _sft(config: Config) -> Iterator[Problem]:
    stage = config.sft
    if stage.path is not None and stage.blend:
        yield Problem("sft.path and sft.blend are both set", "remove one of them")
    yield from stage_batches(config, stage, "sft")


RULES: tuple[Rule, ...] = (_sft,)
