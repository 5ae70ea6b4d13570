"""Opens a run's checkpoint as a model in one process, or over tensor-parallel ranks, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mmscale.checkpoint import integrity, sharded
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.settings import CONFIG, allows_missing, config_of
from mmscale.config import Config, rules
from mmscale.config.derived import for_inference
from mmscale.data.prepared.identity import known
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, MmscaleError
from mmscale.inference import supported_routing
from mmscale.inference.supported_routing import with_width
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.routings import Routing
from mmscale.train.learned_data import read_before, recorded
from mmscale.train.stages.origin import find_routers
from mmscale.train.state.router_state import load_main_tensors, load_router_tensors, main_tensors, router_tensors
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.step import Stepper

T = TypeVar("T")
_SEED = 0  # has no effect, because all weights are read


@dataclass(frozen=True)
class RunModel:
    """A model that scores micro-batches.

    Attributes:
        config: the checkpoint's configuration under the layout of `open_run`; with auxiliary routers if there are any.
        step: optimizer steps that the checkpoint has done.
        groups: process groups; all ranks are tensor-parallel ones.
        module: GPTModel, in Float16Module for bf16.
        vocabulary: ids of the modalities.
        tokenizers: fingerprints of those of training, as in a data set's manifest; empty if the checkpoint is too old.
        trained_on: identities of its training data; empty if the checkpoint is too old.
        trained_before: paths and identities of what its weights were trained on before: by earlier attempts, or before
            its run or stage began.
    """

    config: Config
    step: int
    groups: ProcessGroupCollection
    module: torch.nn.Module
    vocabulary: Vocabulary
    tokenizers: dict[str, str]
    trained_on: tuple[str, ...] = ()
    trained_before: tuple[tuple[str, str], ...] = ()

    def require(self, routing: Routing) -> None:
        """Refuse a routing that this checkpoint does not support.

        Raises:
            UsageError: it has no auxiliary routers, or no thresholds.
        """
        supported_routing.require(self.config.model, routing, step=self.step)

    @torch.no_grad()
    def logits(self, batch: MicroBatch, routing: Routing = Routing.BATCH) -> Tensor:
        """Logits of every position, fp32 [B, S, padded vocabulary], on the host, on every rank; every rank calls it.

        Args:
            batch: tokens and per-token data.
            routing: mode by which experts are assigned to tokens. In all modes but BATCH a token's logits depend only
                on earlier tokens of its document.

        Raises:
            UsageError: this checkpoint does not support that routing.
        """
        self.require(routing)
        inputs = to_device(batch, self.vocabulary, routing=routing)
        self.module.eval()
        logits: Tensor = self.module(
            input_ids=inputs.tokens, position_ids=None, attention_mask=None, packed_seq_params=inputs.params
        )
        if self.groups.tp.size() > 1:  # each rank has the logits of its part of the vocabulary
            logits = gather_from_tensor_model_parallel_region(logits, group=self.groups.tp)
        return logits.float().cpu()


def stepper_of(model: RunModel) -> Stepper:
    """Runs forward passes of a loaded checkpoint as training does."""
    return Stepper(model.config, [model.module], None, model.groups)  # type: ignore[list-item]


@contextmanager
def open_run(
    run: Path, *, step: int | None = None, dtype: str | None = None, env: RankEnv | None = None
) -> Iterator[RunModel]:
    """Load a checkpoint's weights; process groups exist as long as the context. Errors are raised on all ranks.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        dtype: compute in this format (`precision.dtype`) instead of the run's; bf16 weights are exact in fp32.
        env: this process's place among the ranks that share the model, all of them tensor-parallel; None: one process.

    Raises:
        CheckpointError: there is no such run or checkpoint, or it is damaged.
        ConfigError: the model cannot be sharded over so many ranks.
    """
    if not (run / CONFIG).is_file() and not Store.of_run(run).root.is_dir():
        raise CheckpointError(
            f"{run} is not a run folder (no {CONFIG})", remedy="name a run: `mmscale train` prints it"
        )
    place = env or RankEnv()
    groups = process_groups.initialize(place, tp=place.world_size, seed=_SEED)
    try:
        found = _on_first(lambda: _find(run, step), rank=place.rank)
        config = _adapted(found.config, ranks=place.world_size, dtype=dtype)
        if found.width is not None:
            config = with_width(config, found.width)
        transformer = transformer_config(config)
        (module,) = build_chunks(config, groups, transformer=transformer)
        wanted = main_tensors([module], sharded.metadata())
        with integrity.tolerating_deletion(found.main):
            loaded = sharded.read(found.main, wanted, partly=True)
            load_main_tensors([module], loaded)
        if config.model.auxiliary_width is not None:
            wanted = router_tensors([module], sharded.metadata())
            with integrity.tolerating_deletion(found.routers):
                load_router_tensors([module], sharded.read(found.routers, wanted, partly=True))
        wrapped = Float16Module(transformer, module) if transformer.bf16 else module
        vocabulary = Vocabulary.from_config(config.vocab)
        read = tuple(one.identity for one in known(found.info) or ())
        tokenizers = dict(found.info.get("tokenizers") or {})
        before = (*read_before(loaded.get("progress", {}).get("stream", ())), *recorded(found.info))
        yield RunModel(config, found.step, groups, wrapped, vocabulary, tokenizers, read, before)
    finally:
        process_groups.finalize()


@dataclass(frozen=True)
class _Found:
    """A checkpoint and its routers.

    Attributes:
        step: of the main checkpoint.
        config: the configuration that wrote it.
        info: its metadata.
        main: its folder.
        routers: the folder with auxiliary routers, if there are any: the stage's, or `main` of a joint run.
        width: of the stage's routers; None: there are none.
    """

    step: int
    config: Config
    info: dict[str, Any]
    main: Path
    routers: Path
    width: int | None


def _find(run: Path, step: int | None) -> _Found:
    """Choose a checkpoint and the routers that belong to it, and read and hash all of their files."""
    store = Store.of_run(run)
    chosen = store.choose(step)
    folder = store.path(chosen)
    with integrity.tolerating_deletion(folder):
        integrity.require_intact(folder, step=chosen, allow_missing=allows_missing(run))
        info = store.info(chosen)
    config = config_of(info, where=folder, run=run)
    routers, width = (find_routers(run, chosen) if config.model.routes else None) or (folder, None)
    return _Found(chosen, config, info, folder, routers, width)


def _adapted(config: Config, *, ranks: int, dtype: str | None) -> Config:
    """The same model over these ranks, in this number format.

    Raises:
        ConfigError: the model cannot be sharded over so many ranks.
    """
    config = for_inference(config, tp=ranks)
    if ranks > 1:
        rules.check(config, world_size=ranks)
    if dtype is None:
        return config
    return config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": dtype})})


def _on_first(action: Callable[[], T], *, rank: int) -> T:
    """Rank 0's result, or its error, on every rank. Hashing the same files on all ranks would be slow."""
    found: T | Exception | None = None
    if rank == 0:
        try:
            found = action()
        except MmscaleError as error:
            found = error
        except OSError as error:
            found = CheckpointError(f"rank 0: {error}", remedy="check the file system of the run folder")
    found = process_groups.from_first(found)
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[return-value]
