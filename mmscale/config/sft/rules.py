"""Rules about supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config


def _sft(config: Config) -> Iterator[Problem]:
    stage = config.sft
    if stage.path is not None and stage.blend:
        yield Problem("sft.path and sft.blend are both set", "remove one of them")
    size = stage.global_batch_size or config.train.global_batch_size
    micro = stage.micro_batch_size or config.train.micro_batch_size
    if size % micro:
        yield Problem(
            f"sft: the global batch of {size} sequences is not divisible by micro-batches of {micro}",
            "change sft.global_batch_size or sft.micro_batch_size",
        )


RULES: tuple[Rule, ...] = (_sft,)
