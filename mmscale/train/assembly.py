"""Builds the parts of a run before it trains: process groups, model, optimizer, stepper, loader.

run.py combines these parts with checkpoints and logs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.prepared.share import nominal_share
from mmscale.data.stream.loader import BatchLoader
from mmscale.data.stream.mixture import Mixture
from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.freezing import freeze
from mmscale.runtime import device, launch_order, random_state
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.optim.optimizer import make_optimizer, wrap
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer
from mmscale.train.steps.batch import part_of, to_device
from mmscale.train.steps.step import Stepper, Steps
from mmscale.train.steps.step_observers import observers_of, routers_among


@dataclass
class TrainingParts:
    """The computing parts: model chunks, optimizer, process groups, and the routers of a joint run."""

    groups: ProcessGroupCollection
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    stepper: Stepper
    routers: AuxiliaryTrainer | None = None

    @property
    def state(self) -> TrainState:
        """A new state of a run at step 0 over these parts."""
        return TrainState(self.chunks, self.optimizer, routers=self.routers, loss_weights=self.stepper.loss_weights)


def resolve_share(config: Config) -> Config:
    """The configuration with nominal modality shares as numbers: measured from the data if they were 'auto'."""
    if not config.model.has_experts or config.model.experts.share != "auto":
        return config
    share = {name: round(value, 6) for name, value in nominal_share(config).items()}
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def start(config: Config, env: RankEnv) -> ProcessGroupCollection:
    """Seeds, torch.distributed and megatron's process groups."""
    parallel = config.parallel
    launch_order.one_queue(tp=parallel.tp)  # before any code initialises the device
    device.keep_host_memory()
    device.set_seeds(config.run.seed)
    groups = process_groups.initialize(
        env, tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=config.run.seed
    )
    if parallel.overlap_tensor:
        launch_order.user_buffers(
            rows=config.train.micro_batch_size * config.model.seq_length // parallel.cp,
            hidden=config.model.hidden_size,
            tp=parallel.tp,
            fp8=config.precision.fp8 != "off",
            bf16=config.precision.fp8 == "off" or config.precision.fp8_skip_first + config.precision.fp8_skip_last > 0,
        )
    return groups


def build(
    config: Config, groups: ProcessGroupCollection, *, alter: Callable[[list[Any]], None] | None = None
) -> TrainingParts:
    """The model with its initial weights, wrapped, its optimizer and the stepper.

    Args:
        config: the run's configuration, with nominal shares as numbers.
        groups: of the layout.
        alter: changes the model chunks before they are wrapped (negative controls in tests).
    """
    transformer = transformer_config(config)
    built = build_chunks(config, groups, transformer=transformer)
    if alter is not None:
        alter(built)
    freeze(config, built)
    chunks = wrap(config, transformer, built, groups)
    optimizer = make_optimizer(config, chunks, groups)
    observers = observers_of(config, transformer, chunks, groups)
    stepper = Stepper(config, chunks, optimizer, groups, observers=observers)
    return TrainingParts(groups, chunks, optimizer, stepper, routers_among(observers))


def dry_run(config: Config, stepper: Steps, groups: ProcessGroupCollection, data: Mixture) -> None:
    """One batch forward and backward without an update: finds errors of shapes and memory before step 1."""
    own = part_of(groups).batch(data, 0, global_micro_batches(config))
    vocabulary = Vocabulary.from_config(config.vocab)
    with random_state.preserved():  # so that the next step draws the same random numbers as without a restart
        stepper.accumulate([to_device(content, vocabulary) for content in own])
    device.synchronize()


def loader_of(config: Config, groups: ProcessGroupCollection, data: Mixture, *, consumed: int) -> BatchLoader:
    """This rank's part of every global batch.

    Args:
        config: sizes of batches, and workers.
        groups: process groups, which decide the part.
        data: the stream of the run.
        consumed: sequences of the stream that were read before.
    """
    own = part_of(groups)
    loader = BatchLoader(
        data,
        dp_rank=own.rank,
        dp_size=own.size,
        together=own.together,
        context=own.context,
        micro_batches_per_step=global_micro_batches(config),
        workers=config.data.workers,
    )
    loader.load_state_dict({"consumed_sequences": consumed})
    return loader
