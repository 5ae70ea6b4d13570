"""A run's checkpoint as a model in one process, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mmscale.checkpoint import sharded
from mmscale.checkpoint.integrity import require_whole
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config, ParallelConfig
from mmscale.config.load import load as load_config
from mmscale.data.mixture import MicroBatch
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.batch import to_device


@dataclass(frozen=True)
class RunModel:
    """A model that scores micro-batches with batch routing.

    Attributes:
        config: the run's configuration without its parallel layout.
        step: optimizer steps that the checkpoint has done.
        groups: process groups of this one process.
        module: GPTModel, in Float16Module for bf16.
        vocabulary: ids of the modalities.
    """

    config: Config
    step: int
    groups: ProcessGroupCollection
    module: torch.nn.Module
    vocabulary: Vocabulary

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits of every position, fp32 [B, S, padded vocabulary], on the host."""
        inputs = to_device(batch, self.vocabulary)
        self.module.eval()
        logits: Tensor = self.module(
            input_ids=inputs.tokens, position_ids=None, attention_mask=None, packed_seq_params=inputs.params
        )
        return logits.float().cpu()


@contextmanager
def open_run(run: Path, *, step: int | None = None) -> Iterator[RunModel]:
    """Load a checkpoint's weights; process groups of one process live as long as the context.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no such run or checkpoint, or it is damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{run} is not a run folder (no config.yaml)", remedy="name a run: `mmscale train` prints it"
        )
    config = load_config(file).model_copy(update={"parallel": ParallelConfig()})
    store = Store.of_run(run)
    chosen = store.choose(step)
    require_whole(store.path(chosen), step=chosen, allow_missing=config.checkpoint.allow_missing)
    check_shape(config, store.info(chosen).get("shape", {}), where=str(store.path(chosen)))
    groups = process_groups.initialize(RankEnv(), seed=config.run.seed)
    try:
        transformer = transformer_config(config)
        (module,) = build_chunks(config, groups, transformer=transformer)
        wanted = {"model": module.sharded_state_dict(metadata=sharded.metadata())}
        module.load_state_dict(sharded.read(store.path(chosen), wanted, partly=True)["model"])
        wrapped = Float16Module(transformer, module) if transformer.bf16 else module
        yield RunModel(config, chosen, groups, wrapped, Vocabulary.from_config(config.vocab))
    finally:
        process_groups.finalize()
