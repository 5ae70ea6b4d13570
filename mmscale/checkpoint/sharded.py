"""Sharded reading of training state through megatron's dist_checkpointing; any layout reads any other's.

Knows files and sharded state dicts; what the state consists of is train/state.py's business, writing is write.py's.
"""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

from mmscale.checkpoint.pickles import read_metadata, weights_only
from mmscale.errors import CheckpointError
from mmscale.runtime import megatron_cpu

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402  (what ranks raise together)

# How megatron's optimizers name and cut their state. Without chained_optim_avoid_prefix one expert-parallel rank writes
# other keys than two (optimizer.py, ChainedOptimizer.sharded_state_dict); layers differ with Mixture-of-Depths.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def metadata() -> dict[str, Any]:
    """A fresh copy of METADATA: megatron-core changes what it is given."""
    return copy.deepcopy(METADATA)


def read(folder: Path, state: ShardedStateDict, *, partly: bool = False) -> StateDict:
    """Read this rank's part, whatever layout wrote it; every rank calls it.

    Args:
        folder: a committed checkpoint.
        state: what is wanted.
        partly: the checkpoint may hold more than is wanted, e.g. optimizer state.

    Raises:
        CheckpointError: the checkpoint has not what `state` asks for, or is damaged.
    """
    quiet()
    read_metadata(folder)  # megatron-core would run what a hostile one says
    try:
        strict = StrictHandling.RAISE_UNEXPECTED if partly else StrictHandling.RAISE_ALL
        with weights_only():
            return dist_checkpointing.load(state, str(folder), strict=strict)
    except (CheckpointingException, CheckpointException, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {first}",
            remedy="choose another checkpoint, or train with the configuration that wrote it",
        ) from error


def quiet() -> None:
    """No deprecation notes at every save: ours to solve, not the user's."""
    for name in ("megatron.core.dist_checkpointing", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
