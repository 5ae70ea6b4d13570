"""A run of a few seconds that shows the effect of a number format on a loss: small model, artificial language.

The language can be learned, but not from the last token alone, so that attention and experts matter: a text token
follows from the preceding one, an image token from the one two places before. Everything is a function of the
configuration's seed; recipes differ in nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmscale.config import Config
from mmscale.data.vocab import EOS, SPECIAL_TOKENS, Vocabulary
from mmscale.runtime import device, groups
from mmscale.tables.settings import KINDS
from mmscale.train.assembly import build
from mmscale.train.optim.schedule import learning_rate
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import Batch, to_device
from mmscale.train.steps.step import Stepper, mean_losses

_NOISE = 0.1  # share of random tokens
_LANGUAGE = 2026  # the language is the same for all seeds
HELD_OUT_BATCHES = 8  # micro-batches kept for evaluation
_HELD_OUT = 1 << 30  # numbers of micro-batches that no run trains on


class Language(SyntheticMixture):
    """Documents of text with an image inside; a token is a fixed permutation of an earlier one, or noise."""

    def _document(self, rng: np.random.Generator, length: int, *, absent: str | None) -> np.ndarray:
        ids = super()._document(rng, length, absent=absent)
        for back, (low, high) in enumerate(self.vocabulary.ranges, start=1):
            first = low + len(SPECIAL_TOKENS) if low == 0 else low
            places = np.flatnonzero((ids >= first) & (ids < high))
            following = np.random.default_rng(_LANGUAGE + low).permutation(high - first)
            noise = rng.random(len(places)) < _NOISE
            for earlier, place, random in zip(places, places[back:], noise, strict=False):
                if not random:
                    ids[place] = first + following[ids[earlier] - first]
        ids[-1] = EOS
        return ids


@dataclass
class Toy:
    """A trained model and the results of its training.

    Attributes:
        config: of the run.
        stepper: its model.
        losses: training loss of every step; the last one is not finite if the run stopped there.
        held_out: micro-batches that it was not trained on.
    """

    config: Config
    stepper: Stepper
    losses: list[float]
    held_out: list[Batch]

    @property
    def held_out_loss(self) -> float:
        """Mean loss on them, in the format of training."""
        return mean_losses(self.stepper.evaluate(self.held_out).double().cpu(), self.config.vocab.names)["loss"]


def toy_config(
    *,
    kind: str = "moma",
    hidden: int = 64,
    layers: int = 2,
    seq: int = 64,
    batch: int = 8,
    steps: int = 200,
    lr: float = 4e-3,
    seed: int = 1,
    dtype: str = "bf16",
    precision: dict[str, Any] | None = None,
) -> Config:
    """The configuration of a toy, with two experts per modality and slots rounded as for FP8 in every format.

    Args:
        kind: dense or moma.
        hidden: width, also of the experts; a multiple of 32.
        layers: layers.
        seq: tokens of a sequence, a multiple of 16.
        batch: sequences of a step.
        steps: optimizer steps, a tenth of them warm-up.
        lr: peak learning rate.
        seed: of weights and batches.
        dtype: bf16 or fp32.
        precision: further settings of `precision`.
    """
    experts = {
        "counts": {"text": 2, "image": 2},
        "share": {"text": 0.5, "image": 0.5},
        "capacity_multiple": 16,
    }
    return Config.model_validate(
        {
            "run": {"seed": seed},
            "vocab": {"modalities": [{"name": "text", "size": 21}, {"name": "image", "size": 16}]},
            "model": {
                "kind": kind,
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": hidden,
                "num_attention_heads": max(1, hidden // 32),
                "seq_length": seq,
                "experts": experts if KINDS[kind].experts else {},
            },
            "train": {"micro_batch_size": batch, "global_batch_size": batch, "steps": steps},
            "optim": {"lr": lr, "warmup": steps // 10, "schedule": "linear", "min_lr": 0.0},
            "precision": {"dtype": dtype, **(precision or {})},
        }
    )


def train_toy(config: Config) -> Toy:
    """Train from the seed's weights; process groups of one process must exist.

    Args:
        config: one of `toy_config`.
    """
    device.set_seeds(config.run.seed)
    stepper = build(config, groups.collection()).stepper
    share = config.model.experts.share
    language = Language(config, share=share if isinstance(share, dict) else {"text": 0.5, "image": 0.5})
    vocabulary = Vocabulary.from_config(config.vocab)

    def batches(first: int, count: int) -> list[Batch]:
        return [to_device(language.micro_batch(first + number), vocabulary) for number in range(count)]

    toy = Toy(config, stepper, [], batches(_HELD_OUT, HELD_OUT_BATCHES))
    for step in range(1, config.train.steps + 1):
        lr = learning_rate(config.optim, step=step, steps=config.train.steps, tokens=step)
        result = stepper.train(batches(step, 1), lr=lr)
        toy.losses.append(result.losses["loss"])
        if not math.isfinite(toy.losses[-1]) or not torch.isfinite(torch.tensor(result.grad_norm)):
            toy.losses[-1] = math.nan
            break
    return toy
