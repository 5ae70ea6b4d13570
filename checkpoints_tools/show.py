"""Shows the content of a checkpoint: names, shapes and types of tensors, parameters per modality, origin.

Reads the index only; no tensor is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_tools.sources import open_source
from mmscale.checkpoint import integrity, tensor_index
from mmscale.checkpoint.layout import INFO, is_archive
from mmscale.checkpoint.named import open_store
from mmscale.checkpoint.tensors import TensorEntry, is_weight
from mmscale.errors import CheckpointError

SHARED = "shared"  # parameters that tokens of every modality use


def show(path: Path, *, step: int | None = None) -> dict[str, Any]:
    """Tensors, parameter counts and provenance of a checkpoint or an archive.

    Args:
        path: a run's folder or an archive.
        step: the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no such checkpoint, or its index is damaged.
    """
    if is_archive(path):
        source = open_source(path, step)
        entries = [source.entry(name) for name in source.names()]
        return _contents(path, source.path, source.step, entries, source.info())
    store = open_store(path)
    chosen = store.choose(step)
    folder = store.path(chosen)
    with integrity.tolerating_deletion(folder):
        _provenance(folder)  # raises an error before the index is read
        index = tensor_index.read(folder).state_dict_metadata.items()
        entries = [
            TensorEntry(name, tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(index)
            if isinstance(entry, TensorStorageMetadata)
        ]
        return _contents(path, folder, chosen, entries, store.info(chosen))


def _contents(
    path: Path, folder: Path, step: int, entries: Sequence[TensorEntry], info: dict[str, Any]
) -> dict[str, Any]:
    modalities = [str(modality[0]) for modality in info.get("shape", {}).get("vocab.modalities", [])]
    tensors, parameters = [], dict.fromkeys([*modalities, SHARED], 0)
    for entry in entries:
        dtype = str(entry.dtype).removeprefix("torch.")
        tensors.append({"name": entry.name, "shape": list(entry.shape), "dtype": dtype, "bytes": entry.nbytes})
        if is_weight(entry.name):
            owner = next((modality for modality in modalities if modality in entry.name.split(".")), SHARED)
            parameters[owner] += math.prod(entry.shape)
    return {
        "run": str(path),
        "step": step,
        "path": str(folder),
        "provenance": _provenance(folder),
        "parameters": {"total": sum(parameters.values()), **parameters},
        "shape": info.get("shape", {}),
        "tensors": tensors,
    }


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        manifest = integrity.read_manifest(folder)
    except integrity.NoManifestError:
        return {"manifest": False}
    except integrity.DamagedError as error:
        raise CheckpointError(f"{folder} is damaged: {error}", remedy="choose another checkpoint: RUN@STEP") from None
    problems = integrity.structure(folder, manifest) or integrity.content(
        folder, manifest, [name for name in (tensor_index.name_in(manifest.files), INFO) if name in manifest.files]
    )
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {integrity.describe(problems)}", remedy="choose another checkpoint: RUN@STEP"
        )
    sizes = [record.size for record in manifest.files.values()]
    return {
        "manifest": True,
        "attempt": manifest.attempt,
        "topology": manifest.topology,
        "code_version": manifest.code_version,
        "config_digest": manifest.config_digest,
        "files": len(sizes),
        "bytes": sum(sizes),
        "origin": manifest.origin,
    }
