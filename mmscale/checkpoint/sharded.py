"""Sharded reading of training state through megatron's dist_checkpointing; any layout reads any other layout's state.

It handles files and sharded state dicts. train/state/ defines the state; write.py writes it.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mmscale.checkpoint import integrity, tensor_index
from mmscale.checkpoint.kinds import require_types
from mmscale.checkpoint.tensors import SCALING, TensorEntry, is_weight
from mmscale.errors import CheckpointError
from mmscale.runtime import megatron_cpu
from mmscale.runtime.groups import gathered

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict  # noqa: E402
from megatron.core.dist_checkpointing.validation import (  # noqa: E402
    StrictHandling,
    maybe_report_missing_and_unexpected_keys,
)
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402  (what ranks raise together)

# How megatron's optimizers name and shard their state. Without chained_optim_avoid_prefix the keys would depend on
# expert parallelism (optimizer.py, ChainedOptimizer.sharded_state_dict). Layers are non-homogeneous, because they
# differ with Mixture-of-Depths.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def metadata() -> dict[str, Any]:
    """A fresh copy of METADATA, because megatron-core changes it."""
    return copy.deepcopy(METADATA)


def read(folder: Path, state: ShardedStateDict, *, there: Stored | None = None, partly: bool = False) -> StateDict:
    """Read this rank's part, whatever layout wrote it; every rank calls it.

    FP8's scales are read only if both sides have them in the same shape, because precision may change within a run.

    Args:
        folder: a committed checkpoint.
        state: the requested state.
        there: result of `stored` for the folder; None: it is read here.
        partly: the checkpoint may hold more than requested, e.g. optimizer state.

    Raises:
        CheckpointError: the checkpoint lacks a part of `state`, is damaged, or holds tensors of a wrong type or with
            values from which no training can resume.
    """
    quiet()
    there = stored(folder) if there is None else there
    used = {name: entry.type_name for name, entry in there.items() if is_weight(name) or not partly}
    require_types(used, where=folder)
    try:
        state = _without_other_scaling(state, there)
        with tensor_index.vetted(folder, there.index):
            loaded, unread, unknown = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
        unread = set() if partly else {name for name in unread if not name.endswith(SCALING)}
        maybe_report_missing_and_unexpected_keys(unread, unknown)
    except (CheckpointingException, CheckpointException, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {first}",
            remedy="choose another checkpoint, or train with the configuration that wrote it",
        ) from error
    _require_plausible(loaded, folder)
    return loaded


def _require_plausible(loaded: StateDict, folder: Path) -> None:
    """Refuse values that are not finite, and negative second moments; all ranks refuse together.

    The step guard keeps both out of a run's state, so the process that wrote them was faulty.
    """
    mine = list(_implausible(loaded, ""))
    if problems := sorted({line for part in gathered(mine) for line in part}):
        raise CheckpointError(
            f"checkpoint {folder} cannot be used: {integrity.describe(problems)}",
            remedy=f"rename it to {folder.name}.bad: then the run resumes from the checkpoint before it",
        )


def _implausible(part: Any, path: str) -> Iterator[str]:
    if isinstance(part, Tensor):
        if part.is_floating_point() and not bool(part.isfinite().all()):
            yield f"{path} holds values that are not finite"
        elif path.endswith(".exp_avg_sq") and bool((part < 0).any()):
            yield f"{path} holds second moments below zero"
    elif isinstance(part, Mapping | list):
        items = part.items() if isinstance(part, Mapping) else enumerate(part)
        for name, value in items:
            yield from _implausible(value, f"{path}.{name}" if path else str(name))


def _without_other_scaling(state: ShardedStateDict, there: Mapping[str, TensorEntry]) -> ShardedStateDict:
    """The state without FP8 scales that the checkpoint lacks, or has in another shape."""

    def keep(entry: Any) -> bool:
        if not isinstance(entry, ShardedTensor) or not entry.key.endswith(SCALING):
            return True
        known = there.get(entry.key)
        return known is not None and known.shape == tuple(entry.global_shape)

    def kept(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: kept(entry) for name, entry in part.items() if keep(entry)}
        return [kept(entry) for entry in part] if isinstance(part, list) else part

    return kept(state)  # type: ignore[no-any-return]


class Stored(dict[str, TensorEntry]):
    """The tensors of a checkpoint by name.

    Attributes:
        index: torch's description of them, which was checked.
    """

    def __init__(self, index: Metadata) -> None:
        self.index = index
        super().__init__(
            (name, TensorEntry(name, tuple(entry.size), entry.properties.dtype))
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        )


def stored(folder: Path) -> Stored:
    """The tensors of a committed checkpoint, by name; its index is checked.

    Raises:
        CheckpointError: its index cannot be read.
    """
    return Stored(tensor_index.read(folder))


def quiet() -> None:
    """Silence deprecation warnings at every save, which users cannot fix."""
    for name in ("megatron.core.dist_checkpointing", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
