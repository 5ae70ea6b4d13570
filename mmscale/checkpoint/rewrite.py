"""Writes a run's checkpoint from tensors of another source: an archive, another checkpoint, or an average of several.

One process, no process group, one tensor in memory at a time. The result is the same as if ranks had written it
(torch_dist, readable at any layout), and is committed like any checkpoint. It has no random states: a run that
resumes from it starts new ones.
"""

from __future__ import annotations

import functools
import io
import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from mmscale.checkpoint import publish, tensor_index
from mmscale.checkpoint.integrity import CheckpointManifest, FileRecord
from mmscale.checkpoint.layout import FOLDER, INFO, Store, info_text
from mmscale.checkpoint.run_folder import refuse_checkpoints, write_config
from mmscale.checkpoint.shard_files import common_files, tensors_file, write_files, write_items
from mmscale.checkpoint.tensors import TensorEntry, TensorSource, contents_of, without_optimizers
from mmscale.checkpoint.zarr_arrays import boxes, cut
from mmscale.runtime import device, fail_points, megatron_cpu

megatron_cpu.install()


PIECE_BYTES = 256 << 20  # largest piece of a tensor; a rank that needs a part of a piece reads all of it
FILE_BYTES = 1 << 30  # approximate size of a file: ranks share the hashing by files


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is written at once."""

    entry: TensorEntry
    box: tuple[slice, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        number = self.entry.dtype.itemsize
        for part in self.box:
            number *= part.stop - part.start
        return number


def into_run(
    source: TensorSource,
    run: Path,
    *,
    origin: dict[str, Any],
    weights: bool = False,
    files: int | None = None,
    code_version: str = "",
) -> Path:
    """Commit a checkpoint with a source's tensors, counters and configuration in a run folder.

    Args:
        source: of tensors, counters and configuration; its step is the checkpoint's.
        run: the run's folder, which has no committed checkpoint yet. It gets a config.yaml unless it has one.
        origin: how and from what it was made; goes into mmscale.json and the manifest.
        weights: omit the optimizer's state.
        files: number of files with tensors; None: one for every GiB.
        code_version: goes into the manifest.

    Returns:
        The committed checkpoint.

    Raises:
        CheckpointError: the source is damaged, the run has checkpoints, or nothing can be written there.
    """
    store, attempt = Store(run / FOLDER), source.manifest().attempt
    refuse_checkpoints(run)
    info = source.info() | {"step": source.step, "contents": contents_of(source, weights=weights), "origin": origin}
    info.pop("archive", None)
    device.give_back_host_memory()
    with publish.writing(run):
        write_config(run, info.get("config"))
        folder = store.begin(source.step, attempt)
        try:
            records = _write(source, folder, weights=weights, files=files)
            records |= write_files(folder, {INFO: lambda stream: stream.write(info_text(info).encode())})[0]
            fail_points.reached("write")
            manifest = CheckpointManifest(
                step=source.step,
                attempt=attempt,
                config_digest=source.manifest().config_digest,
                code_version=code_version,
                topology={},  # differs from every layout, so that no rank looks for random states
                files=records,
                origin=origin,
            )
            return store.commit(manifest)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write(
    source: TensorSource,
    folder: Path,
    *,
    weights: bool,
    files: int | None,
) -> dict[str, FileRecord]:
    pieces = [Piece(entry, box) for entry in map(source.entry, source.names(weights=weights)) for box in _boxes(entry)]
    groups = deal(pieces, files)
    objects = source.objects()
    plans = [SavePlan([_item(piece) for piece in group]) for group in groups]
    plans[0].items.extend(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in sorted(objects))
    plans, metadata = create_default_global_save_plan(plans)
    cutter = _Cutter(source)
    results: list[WriteResult] = []
    records: dict[str, FileRecord] = {}
    for number, (plan, group) in enumerate(zip(plans, groups, strict=True)):
        name = tensors_file(number)
        # Not FileSystemWriter.write_data: it keeps every tensor of a file in memory until the file is closed.
        items = (
            (item, io.BytesIO(objects[item.index.fqn]) if piece is None else cutter.tensor(piece))
            for item, piece in itertools.zip_longest(plan.items, group)
        )
        content = functools.partial(_tensors, items, name, results)
        records |= write_files(folder, {name: content})[0]
        fail_points.reached("file")
    common = without_optimizers(source.common()) if weights else source.common()
    return records | write_files(folder, {**tensor_index.files(metadata, results), **common_files(common)})[0]


def _tensors(items: Iterable[tuple[WriteItem, Any]], name: str, results: list[WriteResult], stream: Any) -> None:
    results.extend(write_items(items, name, stream))


def _boxes(entry: TensorEntry) -> Iterable[tuple[slice, ...]]:
    if 0 in entry.shape:
        return [tuple(slice(0, size) for size in entry.shape)]  # an empty tensor is one piece
    return boxes(entry.shape, cut(entry.shape, itemsize=entry.dtype.itemsize, limit=PIECE_BYTES))


def deal(pieces: list[Piece], files: int | None) -> list[list[Piece]]:
    """Divides pieces, in order, into files of nearly equal size; at least one file, otherwise none is empty."""
    total = sum(piece.nbytes for piece in pieces)
    number = max(1, min(files or -(-total // FILE_BYTES), len(pieces)))
    dealt: list[list[Piece]] = [[]]
    done = 0
    for position, piece in enumerate(pieces):
        left = len(pieces) - position
        full = done >= total * len(dealt) / number or left <= number - len(dealt)
        if dealt[-1] and full and len(dealt) < number:
            dealt.append([])
        dealt[-1].append(piece)
        done += piece.nbytes
    return dealt


class _Cutter:
    """The tensors of pieces; the source of the pieces of one tensor is read only once."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._name: str | None = None
        self._whole = torch.empty(0)

    def tensor(self, piece: Piece) -> Tensor:
        if piece.entry.name != self._name:
            self._whole = torch.empty(0)  # freed before the next one is read
            self._name, self._whole = piece.entry.name, self._source.read(piece.entry.name)
        return self._whole[piece.box]


def _item(piece: Piece) -> WriteItem:
    offsets = torch.Size(part.start for part in piece.box)
    chunk = ChunkStorageMetadata(offsets, torch.Size(part.stop - part.start for part in piece.box))
    size, properties = torch.Size(piece.entry.shape), TensorProperties(dtype=piece.entry.dtype)
    return WriteItem(
        MetadataIndex(piece.entry.name, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, size),
    )
