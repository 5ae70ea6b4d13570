"""Runs a few training steps on synthetic batches under the initialised layout, with a checkpoint after the first.

`mmscale verify-layout` and the tests use it to compare layouts. verify_layout.py evaluates the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.vocab import Vocabulary
from mmscale.model.choices import Choices
from mmscale.runtime import groups as process_groups
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import part_of, to_device
from mmscale.train.steps.step import mean_losses, reduce_sums

SAVED_STEP = 1  # after the first step, Adam's first moments are gradients times a constant


@dataclass(frozen=True)
class Trace:
    """The results of the steps: losses and gradient norms."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]

    def __add__(self, other: Trace) -> Trace:
        return Trace(self.losses + other.losses, self.grad_norms + other.grad_norms)


class Trial:
    """A short training run from the configuration's initial weights, on batches determined by their number.

    Args:
        config: the run's configuration; with `model.experts.share` 'auto', equal shares are used.
        absent: modality that is missing in odd micro-batches.
        alter: changes the model chunks before they are wrapped (negative controls in tests).
    """

    def __init__(
        self, config: Config, *, absent: str | None = None, alter: Callable[[list[Any]], None] | None = None
    ) -> None:
        self.config = config = with_share(config)
        self.groups = groups = process_groups.collection()
        share = config.model.experts.share
        assert isinstance(share, dict)
        self._mixture = SyntheticMixture(config, share=share, absent=absent)
        self._vocabulary = Vocabulary.from_config(config.vocab)
        parts = build(config, groups, alter=alter)
        self._stepper, self._state = parts.stepper, parts.state

    def train(self, steps: int, *, choices: Choices | None = None) -> Trace:
        """Take steps on the batches with the steps' numbers.

        Args:
            steps: how many.
            choices: records or repeats which tokens were chosen.
        """
        losses, norms = [], []
        own, per_step = part_of(self.groups), global_micro_batches(self.config)
        for step in range(self._state.step, self._state.step + steps):
            mine = own.batch(self._mixture, step * per_step, per_step)
            batches = [to_device(content, self._vocabulary) for content in mine]
            for batch in batches:
                batch.params.choices = choices
            result = self._stepper.train(batches, lr=self.config.optim.lr)
            losses.append(mean_losses(reduce_sums(result.sums, self.groups), self.config.vocab.names)["loss"])
            norms.append(result.grad_norm)
            self._state.step += 1
        return Trace(tuple(losses), tuple(norms))

    def save(self, folder: Path) -> None:
        """Write the state of this step into a folder that all ranks see."""
        with self._stepper.materialized():
            self._checkpoints(folder).save(self._state, last=True)

    def load(self, folder: Path, step: int) -> None:
        """Resume from a checkpoint that any layout wrote."""
        with self._stepper.materialized():
            self._checkpoints(folder).load(self._state, step)

    def _checkpoints(self, folder: Path) -> CheckpointManager:
        return CheckpointManager(
            folder, every=0, keep=1, attempt=1, info={}, on_event=_ignore_event, seed=self.config.run.seed
        )


def take_steps(
    config: Config,
    *,
    steps: int,
    saved: Path | None = None,
    reference: Path | None = None,
    absent: str | None = None,
    alter: Callable[[list[Any]], None] | None = None,
    choices: Choices | None = None,
) -> Trace:
    """Take steps; after the first one save, and continue from another layout's checkpoint if requested.

    Args:
        config: the run's configuration.
        steps: optimizer steps.
        saved: folder for a checkpoint after the first step; None: none is written.
        reference: folder of another trial's checkpoint from which the steps after the first continue; None: from
            its own state.
        absent: as for `Trial`.
        alter: as for `Trial`.
        choices: records or repeats which tokens were chosen in the first step.
    """
    trial = Trial(config, absent=absent, alter=alter)
    trace = trial.train(SAVED_STEP, choices=choices)
    if saved is not None:
        trial.save(saved)
    if reference is not None:
        trial.load(reference, SAVED_STEP)
    return trace + trial.train(steps - SAVED_STEP)


def with_share(config: Config) -> Config:
    """The configuration with nominal shares filled in: equal ones if they would be measured from data."""
    if config.model.experts.share != "auto":
        return config
    names = config.vocab.names
    experts = config.model.experts.model_copy(update={"share": {name: 1.0 / len(names) for name in names}})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def _ignore_event(*event: object, **fields: object) -> None:
    """Ignores the events of checkpoints, because a trial has no log."""
