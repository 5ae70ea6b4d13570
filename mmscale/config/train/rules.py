"""Rules about batches and held-out evaluation."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from mmscale.config.auxiliary.schema import AuxiliaryStageConfig
from mmscale.config.derived import held_out_figures
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.config.sft.schema import SftStageConfig
from mmscale.tables.settings import LOSSES


def _batches(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by train.micro_batch_size = "
            f"{train.micro_batch_size}",
            "change one of them",
        )


def _loss_weights(config: Config) -> Iterator[Problem]:
    if config.train.loss_weights is not None and config.train.loss not in LOSSES:
        yield Problem(
            f"train.loss_weights is set, but the plug-in train.loss = {config.train.loss} computes its own loss",
            "leave out one of them",
        )


def stage_batches(config: Config, stage: AuxiliaryStageConfig | SftStageConfig, section: str) -> Iterator[Problem]:
    """A stage's batch sizes, which are the main run's unless its own section sets them."""
    size = stage.global_batch_size or config.train.global_batch_size
    micro = stage.micro_batch_size or config.train.micro_batch_size
    if size % micro:
        yield Problem(
            f"{section}: the global batch of {size} sequences is not divisible by micro-batches of {micro}",
            f"change {section}.global_batch_size or {section}.micro_batch_size",
        )


def _held_out(config: Config) -> Iterator[Problem]:
    """Settings that use held-out losses need evaluations that measure them."""
    stop = config.train.stop_when
    wanted = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.stop_when.metric": None if stop is None else stop.metric,
    }
    known = held_out_figures(config)
    for key, metric in wanted.items():
        if metric is None:
            continue
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            yield Problem(
                f"{key} = {metric} is nothing that this run measures", f"{meant}choose one of {', '.join(known)}"
            )
        if config.train.eval_every == 0:
            yield Problem(
                f"{key} is set, but train.eval_every is 0: the run is evaluated at its end only",
                "set train.eval_every, e.g. to a twentieth of train.steps",
            )


RULES: tuple[Rule, ...] = (_batches, _loss_weights, _held_out)
