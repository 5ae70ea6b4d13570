"""Reads the tensors of a committed checkpoint by name, whole or in part, whatever layout wrote them.

One process, no process group, no model. A file is hashed before anything in it is read; files without requested tensors
are not opened. It writes nothing; archive.py has the same reader for archives.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mmscale.checkpoint import integrity, tensor_index, torch_files
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.kinds import require_types
from mmscale.checkpoint.layout import INFO, Store
from mmscale.checkpoint.named import OTHER_STEP, manifest_of, open_store
from mmscale.checkpoint.shape import TRAINING, WEIGHTS
from mmscale.errors import CheckpointError

OPTIMIZER = "optimizer."  # prefix of the names of every optimizer's tensors
# Suffix of the names of the state of FP8's delayed scaling. Checkpoints of bf16 runs lack it, and some readers ignore
# it.
SCALING = ".fp8_state"
BACKEND = "metadata.json"  # megatron-core recognises its checkpoints by this file
COMMON = "common.pt"  # megatron-core's file for everything except tensors
Region = Sequence[slice]  # one slice of every dimension, with start and stop inside of it


@dataclass(frozen=True)
class TensorEntry:
    """The description of a tensor in the index.

    Attributes:
        name: the checkpoint's name of it.
        shape: of the whole tensor.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def type_name(self) -> str:
        """The type without "torch.": "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """An object with named tensors: a checkpoint, an archive, or a computation from them.

    Attributes:
        path: for messages.
        step: optimizer steps done.
    """

    path: Path
    step: int

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted; `weights`: without the optimizer's."""

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor on the host.

        Args:
            name: of the tensor, as stored.
            region: a slice of every dimension; None: all of it.

        Raises:
            CheckpointError: there is no such tensor, or it is damaged.
        """

    def info(self) -> dict[str, Any]:
        """The metadata stored next to the tensors (mmscale.json): shape, configuration, provenance."""

    def manifest(self) -> CheckpointManifest:
        """Its files and its origin."""

    def common(self) -> dict[str, Any]:
        """Counters and the optimizer's settings: everything that is neither a tensor nor an object."""

    def objects(self) -> dict[str, bytes]:
        """Serialized objects by name: Transformer-Engine's scaling state, empty with other layers."""


def open_tensors(run: Path, step: int | None = None) -> CheckpointTensors:
    """The tensors of a run's checkpoint.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no such run or checkpoint; it is damaged, has no manifest, or it is world-writable.
    """
    store = open_store(run)
    return CheckpointTensors(store, store.choose(step))


class CheckpointTensors:
    """The tensors of one committed checkpoint (a `TensorSource`).

    Args:
        store: the run's checkpoints.
        step: a committed one.

    Raises:
        CheckpointError: its index shows damage, it has no manifest, or it is world-writable.
    """

    def __init__(self, store: Store, step: int) -> None:
        self.step = step
        self.path = store.path(step)
        self._store = store
        self._hashed: set[str] = set()
        with integrity.tolerating_deletion(self.path):
            self._manifest = manifest_of(self.path, step)
            self._index_file = tensor_index.name_in(self._manifest.files)
            self._require([self._index_file, INFO] if INFO in self._manifest.files else [self._index_file])
            self._index = tensor_index.read(self.path)
        self._reader = FileSystemReader(self.path)
        self._reader.storage_data = self._index.storage_data

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted.

        Args:
            weights: without the optimizer's state and FP8's scales.
        """
        entries = self._index.state_dict_metadata.items()
        found = [name for name, entry in entries if isinstance(entry, TensorStorageMetadata)]
        return sorted(name for name in found if is_weight(name) or not weights)

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor; nothing is read.

        Raises:
            CheckpointError: there is no such tensor.
        """
        found = self._entry(name)
        return TensorEntry(name, tuple(found.size), found.properties.dtype)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor on the host; at most the tensor and one of its stored pieces are in memory.

        Args:
            name: one of `names()`.
            region: a slice of every dimension; None: all of it.

        Raises:
            CheckpointError: there is no such tensor, its type does not match its name, or a file that holds a part of
                it is damaged.
        """
        found = self._entry(name)
        require_types({name: self.entry(name).type_name}, where=self.path, alone=True)
        box = _box(found.size, region)
        target = torch.empty(box.sizes, dtype=found.properties.dtype)
        if target.numel() == 0:
            return target
        items = create_read_items_for_chunk_list(name, found, [box])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise CheckpointError(
                f"{self.path / self._index_file} does not say where all of {name} is", remedy=OTHER_STEP
            )
        self._read(items, ReadInto(target))
        return target

    def info(self) -> dict[str, Any]:
        """The metadata stored next to the tensors.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._store.info(self.step)

    def manifest(self) -> CheckpointManifest:
        """The files and the origin of the checkpoint."""
        return self._manifest

    def common(self) -> dict[str, Any]:
        """Counters and the optimizer's settings, through torch's restricted reader; empty: the checkpoint has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if COMMON not in self._manifest.files:
            return {}
        with integrity.tolerating_deletion(self.path):
            self._require([COMMON])
            try:
                found: dict[str, Any] = torch_files.load(self.path / COMMON)
            except Exception as error:  # a damaged pickle may raise any exception
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{self.path / COMMON} cannot be read: {first}", remedy=OTHER_STEP) from None
        return found

    def objects(self) -> dict[str, bytes]:
        """Serialized objects by name, not opened."""
        entries = self._index.state_dict_metadata.items()
        collected = _Collect()
        for name in sorted(name for name, entry in entries if isinstance(entry, BytesStorageMetadata)):
            index = MetadataIndex(name)
            self._read([_bytes_item(index)], collected)
        return collected.found

    def _entry(self, name: str) -> TensorStorageMetadata:
        found = self._index.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            raise unknown_tensor(name, self.names(), where=self.path)
        return found

    def _read(self, items: list[ReadItem], planner: DefaultLoadPlanner) -> None:
        with integrity.tolerating_deletion(self.path):
            self._require(sorted({self._index.storage_data[item.storage_index].relative_path for item in items}))
            try:
                self._reader.read_data(LoadPlan(items), planner).wait()
            # Its digest is correct, so it was written like this; torch may raise any exception.
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise CheckpointError(
                    f"{self.path} cannot be read: {type(error).__name__}: {first}", remedy=OTHER_STEP
                ) from None

    def _require(self, names: list[str]) -> None:
        """Hash files that were not hashed yet."""
        new = [name for name in names if name not in self._hashed]
        unknown = [f"{name} is not in the manifest" for name in new if name not in self._manifest.files]
        problems = unknown or integrity.content(self.path, self._manifest, new)
        if problems:
            raise CheckpointError(f"{self.path} is damaged: {integrity.describe(problems)}", remedy=OTHER_STEP)
        self._hashed.update(new)


class ReadInto(DefaultLoadPlanner):
    """Copies the pieces that are read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the tensor that an item fills."""
        part = self._target
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, offset, length)
        return part


class _Collect(DefaultLoadPlanner):
    """Keeps bytes as they are: nothing is unpickled."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, bytes] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.found[read_item.dest_index.fqn] = value.getvalue()


def _bytes_item(index: MetadataIndex) -> ReadItem:
    nothing = torch.Size([0])
    return ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)


def _box(size: torch.Size, region: Region | None) -> ChunkStorageMetadata:
    if region is None:
        return ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    assert len(region) == len(size), (region, size)
    assert all(0 <= part.start <= part.stop <= length for part, length in zip(region, size, strict=True)), region
    return ChunkStorageMetadata(
        torch.Size(part.start for part in region), torch.Size(part.stop - part.start for part in region)
    )


def is_weight(name: str) -> bool:
    """Whether a tensor is part of the model: not an optimizer's, not FP8's scales."""
    return not name.startswith(OPTIMIZER) and not name.endswith(SCALING)


def contents_of(source: TensorSource, *, weights: bool = False) -> str:
    """The content of a copy of a source: "training", or "weights" without the optimizer's state."""
    has_optimizer = any(name.startswith(OPTIMIZER) for name in source.names())
    return TRAINING if has_optimizer and not weights else WEIGHTS


def without_optimizers(common: dict[str, Any]) -> dict[str, Any]:
    """The common part of the state, without the settings of optimizers: `optimizer`, `auxiliary_optimizer`."""
    return {name: part for name, part in common.items() if not name.endswith(OPTIMIZER.rstrip("."))}


def origin_of(made_by: str, parents: Sequence[TensorSource], **settings: Any) -> dict[str, Any]:
    """How an output was made and from what, for its manifest and mmscale.json.

    Args:
        made_by: the command.
        parents: its inputs.
        settings: further options of the command, plain JSON.

    Returns:
        `made_by`, the settings, and `parents`: path, step, attempt, versions, digest of the manifest, and the parent's
            own origin if it has one.
    """
    found = []
    for parent in parents:
        manifest = parent.manifest()
        row: dict[str, Any] = {"path": str(parent.path), "step": parent.step, "attempt": manifest.attempt}
        row |= {"code_version": manifest.code_version, "config_digest": manifest.config_digest}
        row["manifest"] = integrity.text_digest(manifest.text())
        found.append(row if manifest.origin is None else row | {"origin": manifest.origin})
    return {"made_by": made_by, **settings, "parents": found}


def unknown_tensor(name: str, names: list[str], *, where: Path) -> CheckpointError:
    """The error for a name that does not exist, with similar names."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return CheckpointError(
        f"{where} has no tensor {name}",
        remedy=f"did you mean {' or '.join(close)}?" if close else "`mmscale ckpt show` lists the names",
    )
