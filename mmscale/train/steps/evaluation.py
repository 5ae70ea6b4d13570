"""Losses on held-out data, computed with the layout that trains.

With batch routing, experts and depth layers choose among all tokens of a sequence, later ones included, so those losses
use information about the future. Causal routing needs auxiliary routers, or thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.stream.bits import bits_per_byte
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.mixture import Mixture
from mmscale.data.vocab import Vocabulary
from mmscale.model.auxiliary import RouterLearning
from mmscale.runs.extents import Extent
from mmscale.runtime import device
from mmscale.tables.routings import Routing
from mmscale.train.steps.batch import part_of, to_device, with_conditions
from mmscale.train.steps.step import Steps, mean_losses, reduce_sums
from mmscale.wording import numbered


class CutShortError(Exception):
    """A stop was requested during an evaluation; raised on every rank."""


def extent_of(config: Config, mixture: Mixture, *, batches: int | None) -> Extent:
    """How much `evaluate` reads.

    Args:
        config: batch sizes.
        mixture: one pass over a set.
        batches: global batches at most; None: the whole set.
    """
    available = -(-mixture.len_epoch() // global_micro_batches(config))
    return Extent(available if batches is None else min(available, batches), available)


def partly_read(extents: Mapping[str, Extent], *, batches: int) -> list[str]:
    """A note for users who compare held-out losses of training with those of `mmscale eval`; empty if all is read.

    Args:
        extents: how much of a set is read, by its name.
        batches: `train.eval_batches`.
    """
    if not any(extent.partial for extent in extents.values()):
        return []
    return [
        f"evaluations read the first {numbered(batches, 'batch', 'batches')} of a set (train.eval_batches); `mmscale "
        "eval` reads all of them, and "
        f"gives the same numbers with --batches {batches}"
    ]


def evaluate(
    config: Config,
    *,
    stepper: Steps,
    mixture: Mixture,
    groups: ProcessGroupCollection,
    batches: int | None,
    routing: Routing = Routing.BATCH,
    learning: RouterLearning | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Losses over the first global batches of a pass; every rank calls it.

    `loss`, `loss/<modality>`, `z_loss`, and losses of one modality given another (`conditional_loss/<pair>`).

    The micro-batches are the same under every layout. The last global batch is filled up with micro-batches whose
    labels do not count.

    Args:
        config: batch sizes.
        stepper: runs the model forward.
        mixture: one pass over the held-out data.
        groups: process groups.
        batches: global batches; None: all of them.
        routing: mode by which experts are assigned to tokens; the model must have what it needs.
        learning: collects metrics of auxiliary routers against the true choices of batch routing; None: not measured.
        on_batch: called before each global batch, and before the results of ranks are added up, because a device may
            lag behind by as many kernels as its queue holds. It may raise, the same on every rank.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    per_step = global_micro_batches(config)
    available = mixture.len_epoch()
    steps = extent_of(config, mixture, batches=batches).batches
    own = part_of(groups)
    rows = len(vocabulary.names) ** 2 + 1  # of modalities, the z-loss and pairs of modalities
    total = torch.zeros(rows, 2, device=device.taken(), dtype=torch.float64)
    for step in range(steps):
        on_batch()
        parts = []
        for number in own.numbers(step * per_step, per_step):
            inside = number < available
            content = own.read(mixture, number, last=available - 1)
            content = content if inside else _silent(content)
            part = with_conditions(to_device(content, vocabulary, routing=routing), content, vocabulary)
            part.params.learning = learning if inside else None
            parts.append(part)
        total += stepper.evaluate(parts)
    on_batch()
    return mean_losses(reduce_sums(total, groups), vocabulary.names)


def evaluate_passes(
    config: Config,
    *,
    stepper: Steps,
    passes: Mapping[str, Mixture],
    groups: ProcessGroupCollection,
    routing: Routing,
    learning: RouterLearning | None,
    on_batch: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """`evaluate` for each held-out set by its name, over `train.eval_batches`, and bits per byte.

    `learning` receives the first set only.
    """
    found = {}
    text = Vocabulary.from_config(config.vocab).names[0]
    for name, mixture in passes.items():
        found[name] = evaluate(
            config,
            stepper=stepper,
            mixture=mixture,
            groups=groups,
            batches=config.train.eval_batches,
            routing=routing,
            learning=learning,
            on_batch=on_batch,
        )
        found[name] |= bits_per_byte(found[name], mixture, text=text)
        learning = None
    return found


def _silent(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch without labels that count: pipelines need a certain number of micro-batches."""
    return replace(batch, loss_mask=np.zeros_like(batch.loss_mask), label_counts=tuple(0 for _ in batch.label_counts))
