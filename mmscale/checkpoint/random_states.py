"""Files of ranks' random states in a checkpoint: one for each rank, or one for a group (`checkpoint.writers`).

runtime/random_state.py defines the content of a state.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import torch_files
from mmscale.errors import CheckpointError

FOLDER = "rng"
_OF_GROUP = re.compile(r"^ranks_(\d{5,})\.pt$")


def file_of(rank: int) -> str:
    """Path of a rank's own file in a checkpoint."""
    return f"{FOLDER}/rank_{rank:05d}.pt"


def file_of_group(first: int) -> str:
    """Path of the file of a group, named after its first rank."""
    return f"{FOLDER}/ranks_{first:05d}.pt"


def serialize(state: dict[str, Any]) -> bytes:
    """The bytes of a state, as in a rank's own file."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def write(states: Mapping[int, bytes], stream: Any) -> None:
    """Write the file of a group.

    Args:
        states: serialized, by rank; written without deserializing them.
        stream: to write to.
    """
    torch.save({rank: torch.frombuffer(bytearray(state), dtype=torch.uint8) for rank, state in states.items()}, stream)


def read(folder: Path, rank: int) -> dict[str, Any] | None:
    """The random state of a rank; None if the checkpoint has none.

    Raises:
        CheckpointError: its file cannot be read.
    """
    file = folder / file_of(rank)
    if file.is_file():
        return _load(file, file)
    for file in _files_of_groups(folder, rank):
        states = _load(file, file)
        if rank in states:
            return _load(io.BytesIO(states[rank].numpy().tobytes()), file)
    return None


def _files_of_groups(folder: Path, rank: int) -> list[Path]:
    """Files of groups. The first one is that of the rank if groups consist of neighbours, as on most clusters."""
    found = {
        int(match[1]): file for file in (folder / FOLDER).glob("ranks_*.pt") if (match := _OF_GROUP.match(file.name))
    }
    return [found[first] for first in sorted(found, key=lambda first: (first > rank, -first))]


def _load(source: Any, file: Path) -> dict[Any, Any]:
    try:
        return dict(torch_files.load(source))
    except (RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read: {first}", remedy="choose an older checkpoint") from None
