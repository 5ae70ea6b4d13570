"""What a checkpoint holds: names, shapes and types of its tensors, parameters per modality, where it comes from.

Reads the index only, through the allow-list of mmscale.checkpoint.pickles; no tensor is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_tools.folders import open_store
from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import INFO
from mmscale.checkpoint.pickles import METADATA, read_metadata
from mmscale.errors import CheckpointError

SHARED = "shared"  # what tokens of every modality use


def show(run: Path, *, step: int | None = None) -> dict[str, Any]:
    """Tensors, parameter counts and provenance of a checkpoint.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no such checkpoint, or its index is damaged.
    """
    store = open_store(run)
    chosen = store.choose(step)
    folder = store.path(chosen)
    provenance = _provenance(folder)
    info = store.info(chosen)
    modalities = [str(entry[0]) for entry in info.get("shape", {}).get("vocab.modalities", [])]
    tensors, parameters = [], dict.fromkeys([*modalities, SHARED], 0)
    for name, entry in sorted(read_metadata(folder).state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata):
            continue
        number, dtype = math.prod(entry.size), entry.properties.dtype
        tensors.append(
            {
                "name": name,
                "shape": list(entry.size),
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": number * dtype.itemsize,
            }
        )
        if not name.startswith("optimizer."):
            owner = next((modality for modality in modalities if modality in name.split(".")), SHARED)
            parameters[owner] += number
    return {
        "run": str(run),
        "step": chosen,
        "path": str(folder),
        "provenance": provenance,
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
    problems = integrity.structure(folder, manifest) or integrity.content(folder, manifest, [METADATA, INFO])
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
    }
