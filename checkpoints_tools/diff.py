"""How far two checkpoints are apart, tensor by tensor: never more than one pair of tensors is in memory.

Tensors are whole ones, whatever layout wrote them. One process, no process group.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from checkpoints_tools.folders import open_store
from mmscale.checkpoint import integrity
from mmscale.checkpoint.pickles import read_metadata, weights_only


class _Reader(FileSystemReader):
    """Reads the index once, through the allow-list."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_metadata(folder)
        if self.index.storage_meta is None:
            self.index.storage_meta = StorageMeta()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.index

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = self.index.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def tensor(self, name: str) -> Tensor:
        entry = self.tensors()[name]
        wanted = {name: torch.zeros(entry.size, dtype=entry.properties.dtype)}
        with weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process": it is
            load(wanted, storage_reader=self, no_dist=True)
        return wanted[name]


def diff(one: tuple[Path, int | None], other: tuple[Path, int | None], *, weights: bool = False) -> dict[str, Any]:
    """Compare two checkpoints that are whole.

    Args:
        one: run folder and step; None: the newest.
        other: the same of the other one.
        weights: leave the optimizer's state out.

    Returns:
        `tensors`: shape, `max_abs` and `max_rel` (of the largest element of `one`) of every tensor that both have in
        one shape; `only_in_one`, `only_in_other`, `other_shape`: names; `max_abs`, `max_rel` over all; `equal`.

    Raises:
        CheckpointError: one of them does not exist or is damaged.
    """
    readers = [_open(run, step) for run, step in (one, other)]
    names = [
        {name: entry for name, entry in reader.tensors().items() if not (weights and name.startswith("optimizer."))}
        for reader in readers
    ]
    rows, shapes = [], []
    for name in sorted(names[0].keys() & names[1].keys()):
        if names[0][name].size != names[1][name].size:
            shapes.append(name)
            continue
        rows.append({"name": name, "shape": list(names[0][name].size), **_distance(name, *readers)})
    result: dict[str, Any] = {
        "one": str(readers[0].path),
        "other": str(readers[1].path),
        "only_in_one": sorted(names[0].keys() - names[1].keys()),
        "only_in_other": sorted(names[1].keys() - names[0].keys()),
        "other_shape": shapes,
        "max_abs": max((row["max_abs"] for row in rows), default=0.0),
        "max_rel": max((row["max_rel"] for row in rows), default=0.0),
        "tensors": rows,
    }
    same_names = not (shapes or result["only_in_one"] or result["only_in_other"])
    return {"equal": same_names and all(row["equal"] for row in rows), **result}


def _open(run: Path, step: int | None) -> _Reader:
    store = open_store(run)
    chosen = store.choose(step)
    integrity.require_whole(store.path(chosen), step=chosen)
    return _Reader(store.path(chosen))


def _distance(name: str, one: _Reader, other: _Reader) -> dict[str, Any]:
    mine, theirs = one.tensor(name), other.tensor(name)
    equal = mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if equal or mine.numel() == 0:
        return {"max_abs": 0.0, "max_rel": 0.0, "equal": equal}
    first = mine.double()
    apart = float((first - theirs.double()).abs().max())
    largest = float(first.abs().max())
    relative = apart / largest if largest > 0 else (0.0 if apart == 0 else float("inf"))
    return {"max_abs": apart, "max_rel": relative, "equal": False}
