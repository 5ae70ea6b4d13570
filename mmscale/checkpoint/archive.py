"""Layout-independent archives of checkpoints: a zarr v3 array for every tensor, JSON for the rest, a manifest.

    MANIFEST.json              every file with size and digest; written last, before the folder gets its name
    mmscale.json               step, shape of the model, configuration, origin
    state.json  objects.json   counters and the optimizer's settings; serialized objects of layers (base64, not opened)
    tensors/<name>/            zarr.json and shards c/...: readable with any zarr v3 library; bfloat16 and FP8 are
                               stored as unsigned integers of their bits, with the type in the attribute `dtype`

An archive holds weights, optimizer state and counters. Random states belong to the ranks of a layout and are not
stored: a run that resumes from an archive starts new ones. Reading and writing stream one tensor at a time. rewrite.py
restores archives.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from mmscale import bounded
from mmscale.checkpoint import integrity, plain, publish, zarr_arrays
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.kinds import require_types
from mmscale.checkpoint.layout import ARRAYS, INFO
from mmscale.checkpoint.named import ARCHIVE_FORMAT, damaged_archive, find_archive
from mmscale.checkpoint.tensors import (
    Region,
    TensorEntry,
    TensorSource,
    contents_of,
    is_weight,
    origin_of,
    unknown_tensor,
    without_optimizers,
)
from mmscale.checkpoint.zarr_arrays import Grid
from mmscale.errors import CheckpointError
from mmscale.runtime import device, fail_points

STATE = "state.json"
OBJECTS = "objects.json"
_LONGEST = 200  # bytes of a folder's name; file systems allow 255


def write(
    source: TensorSource,
    out: Path,
    *,
    weights: bool = False,
    grid: Grid = Grid(),  # noqa: B008  frozen
    code_version: str = "",
) -> CheckpointManifest:
    """Write an archive of a checkpoint.

    Args:
        source: the checkpoint.
        out: the archive, a folder that does not exist yet.
        weights: exclude the optimizer state.
        grid: sizes of chunks and shards.
        code_version: for the manifest.

    Raises:
        CheckpointError: the source is damaged, `out` exists or nothing can be written there.
    """
    origin = origin_of("archive", [source])
    device.give_back_host_memory()
    with publish.folder(out) as temporary:
        fail_points.reached("begin")
        _write_tensors(source, temporary / ARRAYS, weights=weights, grid=grid)
        common = without_optimizers(source.common()) if weights else source.common()
        info = source.info() | {
            "archive": ARCHIVE_FORMAT,
            "step": source.step,
            "contents": contents_of(source, weights=weights),
            "origin": origin,
        }
        objects = {name: base64.b64encode(content).decode() for name, content in source.objects().items()}
        for name, content in ((STATE, plain.encode(common)), (OBJECTS, objects), (INFO, info)):
            (temporary / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        fail_points.reached("write")
        manifest = CheckpointManifest(
            step=source.step,
            attempt=source.manifest().attempt,
            config_digest=source.manifest().config_digest,
            code_version=code_version,
            topology={},
            files=integrity.digests(temporary, integrity.sizes(temporary)),
            origin=origin,
        )
        fail_points.reached("hash")
        publish.commit(temporary, out, manifest)
    return manifest


def _write_tensors(source: TensorSource, root: Path, *, weights: bool, grid: Grid) -> None:
    root.mkdir()
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (root / zarr_arrays.META).write_text(json.dumps(group), encoding="utf-8")
    for name in source.names(weights=weights):
        dtype = str(source.entry(name).dtype).removeprefix("torch.")
        if dtype not in zarr_arrays.DTYPES:
            raise CheckpointError(
                f"{name} has type {dtype}, which zarr does not know", remedy="archive a checkpoint of another precision"
            )
        zarr_arrays.write(root / folder_of(name), source.read(name), grid=grid)
        fail_points.reached("tensor")


def folder_of(name: str) -> str:
    """The name of a tensor's folder: characters other than letters, digits and `_.-~` are percent-encoded.

    Raises:
        CheckpointError: no file system would accept it.
    """
    folder = quote(name, safe="")
    if not folder or folder.startswith(".") or len(folder) > _LONGEST:
        raise CheckpointError(f"{name!r} cannot be the name of a folder", remedy="give the tensor another name")
    return folder


class ArchiveTensors:
    """The tensors of an archive (a `TensorSource`).

    Opening checks the names and sizes of all files. A tensor that is read as a whole is hashed first. For a part of a
    tensor only its chunks are read and checked against their crc32c.

    Args:
        path: the archive.

    Raises:
        CheckpointError: names or sizes show damage, the version is unknown, or it is world-writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = find_archive(path)
        self._manifest, self.step = found.manifest, found.step
        self._hashed = {INFO}
        self._metadata: dict[str, dict[str, Any]] = {}
        ends = f"/{zarr_arrays.META}"
        folders = [name.removeprefix(f"{ARRAYS}/").removesuffix(ends) for name in self._manifest.files if ends in name]
        self._names = sorted(unquote(folder) for folder in folders if "/" not in folder and folder != zarr_arrays.META)

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted.

        Args:
            weights: without the optimizer's state.
        """
        return [name for name in self._names if is_weight(name) or not weights]

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor; reads its description only.

        Raises:
            CheckpointError: there is no such tensor, or its description or a shard is missing.
        """
        metadata = self._description(name)
        try:
            dtype = zarr_arrays.dtype_of(metadata)
        except ValueError as error:
            raise damaged_archive(self.path, [f"{name}: {error}"]) from None
        return TensorEntry(name, tuple(metadata["shape"]), getattr(torch, dtype))

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor on the host.

        Args:
            name: one of `names()`.
            region: a slice of every dimension; None: all of it.

        Raises:
            CheckpointError: there is no such tensor, its type is not what its name says, or a shard is damaged.
        """
        require_types({name: self.entry(name).type_name}, where=self.path, alone=True)
        folder = f"{ARRAYS}/{folder_of(name)}"
        if region is None:
            self._require([f"{folder}/{file}" for file in zarr_arrays.shard_files(self._metadata[name])])
        try:
            return zarr_arrays.read(self.path / folder, None if region is None else tuple(region))
        except ValueError as error:
            raise damaged_archive(self.path, [f"{name}: {str(error).splitlines()[0]}"]) from None

    def info(self) -> dict[str, Any]:
        """The metadata stored next to the tensors."""
        return dict(self._json(INFO))

    def manifest(self) -> CheckpointManifest:
        """The files and the origin of the archive."""
        return self._manifest

    def common(self) -> dict[str, Any]:
        """Counters and the optimizer's settings.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            return dict(plain.decode(self._json(STATE)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged_archive(self.path, [f"{STATE}: {error}"]) from None

    def objects(self) -> dict[str, bytes]:
        """Serialized objects of layers by name, as bytes that are not opened.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            return {str(name): base64.b64decode(text, validate=True) for name, text in self._json(OBJECTS).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise damaged_archive(self.path, [f"{OBJECTS}: {error}"]) from None

    def _description(self, name: str) -> dict[str, Any]:
        if name not in self._metadata:
            if name not in self._names:
                raise unknown_tensor(name, self._names, where=self.path)
            folder = f"{ARRAYS}/{folder_of(name)}"
            metadata = self._json(f"{folder}/{zarr_arrays.META}")
            try:
                shards = [f"{folder}/{file}" for file in zarr_arrays.shard_files(metadata)]
            except ValueError as error:
                raise damaged_archive(self.path, [f"{folder}/{zarr_arrays.META}: {error}"]) from None
            missing = [f"{file} is missing" for file in shards if file not in self._manifest.files]
            if missing:
                raise damaged_archive(self.path, missing)
            self._metadata[name] = metadata
        return self._metadata[name]

    def _json(self, name: str) -> Any:
        self._require([name])
        try:
            return bounded.read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise damaged_archive(self.path, [f"{name}: {error}"]) from None

    def _require(self, names: list[str]) -> None:
        """Hash files that have not been hashed yet."""
        new = [name for name in names if name not in self._hashed]
        unknown = [f"{name} is not in the manifest" for name in new if name not in self._manifest.files]
        problems = unknown or integrity.content(self.path, self._manifest, new)
        if problems:
            raise damaged_archive(self.path, problems)
        self._hashed.update(new)
