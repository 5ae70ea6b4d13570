"""Weights in safetensors shards with an index, written and read tensor by tensor.

Reading checks that every name in the index refers to a file in the folder, and that every tensor of every shard is in
the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools.huggingface.weights import Move
from mmscale import bounded
from mmscale.checkpoint.tensors import TensorEntry
from mmscale.errors import CheckpointError
from mmscale.runtime import device
from mmscale.runtime.atomic_files import fsync
from mmscale.runtime.file_modes import apply_umask

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_AGAIN = "copy the folder again, or export it again: `mmscale convert to-hf`"


class Weights(Protocol):
    """An object with named tensors."""

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor, on the host."""


@dataclass(frozen=True)
class WrittenWeights:
    """A summary of the written weights.

    Attributes:
        tensors: number of tensors.
        bytes: of all tensors.
        shards: names of the files.
    """

    tensors: int
    bytes: int
    shards: tuple[str, ...]


def write_weights(folder: Path, source: Weights, moves: Sequence[Move], *, shard_bytes: int) -> WrittenWeights:
    """Write all tensors. One shard, the tensor that is being read and a copy of one part of it are in memory.

    Args:
        folder: to write into.
        source: the checkpoint.
        moves: how its tensors are converted.
        shard_bytes: largest shard; a larger tensor has a separate one [bytes].
    """
    plan = _plan(source, moves, shard_bytes)
    files = (
        [SINGLE] if len(plan) == 1 else [f"model-{n + 1:05d}-of-{len(plan):05d}.safetensors" for n in range(len(plan))]
    )
    device.give_back_host_memory()
    shard: dict[str, Tensor] = {}
    number, where, total = 0, {}, 0
    for move in moves:
        parts = move.split(source.read(move.source))
        for name in move.targets:
            part = parts.pop(0)
            # Copied, because a view would keep the whole tensor in memory, and safetensors needs contiguous tensors.
            own = part.is_contiguous() and len(move.targets) == 1
            shard[name] = part if own else part.clone(memory_format=torch.contiguous_format)
            where[name] = files[number]
            total += part.nbytes
            del part
            if len(shard) == len(plan[number]):  # written before the next tensor is read
                _write(folder / files[number], shard)
                shard = {}
                number += 1
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return WrittenWeights(len(where), total, tuple(files))


def _plan(source: Weights, moves: Sequence[Move], shard_bytes: int) -> list[set[str]]:
    """Names of each shard, in the moves' order."""
    shards: list[set[str]] = [set()]
    filled = 0
    for move in moves:
        entry = source.entry(move.source)
        parts = move.split(torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        for name, part in zip(move.targets, parts, strict=True):
            if filled and filled + part.nbytes > shard_bytes:
                shards.append(set())
                filled = 0
            shards[-1].add(name)
            filled += part.nbytes
    return shards


def _write(file: Path, shard: dict[str, Tensor]) -> None:
    save_file(shard, file, metadata={"format": "pt"})
    apply_umask(file)
    fsync(file)


class WeightsByName(Protocol):
    """Weights of a folder under the names of transformers."""

    folder: Path

    def names(self) -> set[str]:
        """Names of all tensors."""

    def file(self, name: str) -> Path:
        """The file to name in errors about a tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of its elements."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the host."""


class ModelFiles:
    """The weights of a Hugging Face folder, by name.

    Args:
        folder: with `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: there are none; a file is missing, damaged or outside of the folder; files and index disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        for file, wanted in self._listed().items():
            found = self._names(file)
            missing = sorted((wanted or found) - found)
            if missing:
                raise CheckpointError(f"{file} lacks {missing[0]}, which {INDEX} promises", remedy=_AGAIN)
            more = sorted(found - (wanted or found))
            if more:
                raise CheckpointError(f"{file} holds {more[0]}, which {INDEX} does not list there", remedy=_AGAIN)
            self._file |= dict.fromkeys(found, file)

    def _listed(self) -> dict[Path, set[str] | None]:
        """Files with the names of their tensors in the index; None: there is no index."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / SINGLE).is_file():
                old = ", ".join(sorted(file.name for file in self.folder.glob("*.bin")))
                why = f"; {old} may run code when it is read" if old else ""
                raise CheckpointError(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}{why}",
                    remedy="name a folder with weights in safetensors",
                )
            return {_inside(self.folder, SINGLE, said_by=self.folder): None}
        try:
            entries = bounded.read_json(self.folder / INDEX)["weight_map"].items()
        except (OSError, *bounded.BAD_CONTENT) as error:
            raise CheckpointError(f"{self.folder / INDEX} cannot be read: {error!r}", remedy=_AGAIN) from None
        files: dict[Path, set[str] | None] = {}
        for name, file in entries:
            path = _inside(self.folder, file, said_by=self.folder / INDEX)
            files.setdefault(path, set()).add(name)  # type: ignore[union-attr]
        return files

    @staticmethod
    def _names(file: Path) -> set[str]:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", remedy=_AGAIN)
        try:
            with safe_open(file, framework="pt") as opened:
                return set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}", remedy=_AGAIN) from None

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self.dtype(name)
        with safe_open(self._file[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements.

        Raises:
            CheckpointError: there is no such tensor, or its type is not supported for weights.
        """
        if name not in self._file:
            raise CheckpointError(f"{self.folder} has no tensor {name}", remedy="it is not a model of this kind")
        with safe_open(self._file[name], framework="pt") as opened:
            found = str(opened.get_slice(name).get_dtype())
        if found not in _DTYPES:
            raise CheckpointError(
                f"{self._file[name]}: {name} is of type {found}, not one of {', '.join(_DTYPES)}",
                remedy="choose the weights of the model that are not quantised",
            )
        return _DTYPES[found]

    def read(self, name: str) -> Tensor:
        """A tensor, copied so that it does not refer to the file.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with safe_open(self._file[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor.clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file[name]} is damaged: {error}", remedy=_AGAIN) from None


def _inside(folder: Path, name: object, *, said_by: Path) -> Path:
    path = PurePosixPath(str(name))
    escapes = not isinstance(name, str) or not name.isprintable() or path.is_absolute() or ".." in path.parts
    file = folder / ("" if escapes or "\\" in str(name) else path)
    # In the cache of huggingface_hub every file of snapshots/<commit> is a link into blobs/.
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if file == folder or not any(file.resolve().is_relative_to(home) for home in homes):
        raise CheckpointError(
            f"{said_by} names the file {str(name)[:200]!r}, outside of the folder",
            remedy="do not use it, and find out where it comes from",
        )
    return file


def refuse_two_output_layers(files: WeightsByName, *, tied: bool) -> None:
    """Refuse a separate output layer if the configuration says that the embedding is used.

    Args:
        files: the model's weights.
        tied: `tie_word_embeddings` of config.json.

    Raises:
        CheckpointError: the two differ, so that one would be dropped silently.
    """
    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    names = set(files.names())
    if not tied or output not in names or embedding not in names:
        return
    if not torch.equal(files.read(output), files.read(embedding)):
        raise CheckpointError(
            f"{files.folder}: config.json says that {output} is {embedding} (tie_word_embeddings), but it is another",
            remedy="set tie_word_embeddings to false if the output layer was trained by itself; else delete it",
        )


def unaccounted(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Missing and unexpected names, in words."""
    found, wanted = set(found), set(wanted)
    return [f"{name} is missing" for name in sorted(wanted - found)] + [
        f"{name} is not known" for name in sorted(found - wanted)
    ]
