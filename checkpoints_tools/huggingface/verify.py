"""Checks whether a Hugging Face folder is intact: digests if it has them, and values of its tensors.

An export has digests of its files in MANIFEST.json. A model that transformers saved again has none, or those of the
export that it was made from; then only shapes and values can be checked. Nothing is written or renamed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.huggingface.export_settings import CONFIG, REPORT
from checkpoints_tools.huggingface.files import INDEX, WeightsByName
from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.errors import CheckpointError

_CARD = "README.md"  # edited by hand, and by model hubs
_AGAIN = "copy the folder again, or export it again: `mmscale convert to-hf`"


@dataclass(frozen=True)
class Digests:
    """The result of comparing a folder with its manifest.

    Attributes:
        same: files whose content is unchanged since the export.
        said: the result in words, for people.
    """

    same: frozenset[str]
    said: str


def is_weights(name: str) -> bool:
    """Whether a file affects the result of `mmscale convert from-hf`."""
    return name.endswith(".safetensors") or name in (INDEX, CONFIG)


def is_used(name: str) -> bool:
    """Whether a file affects the results of `mmscale eval` and `sample`, which never run the code in a folder."""
    return name not in (_CARD, REPORT) and not name.endswith(".py")


def check_digests(folder: Path, content: Mapping[str, Any], *, used: Callable[[str], bool]) -> Digests:
    """Compare files with the folder's manifest, if there is one.

    Files that the manifest does not list are ignored: model hubs and trainers add some.

    Args:
        folder: with config.json.
        content: of its config.json.
        used: says whether a file matters to the caller, by its name.

    Raises:
        CheckpointError: a file that matters is missing, or has another content than was exported, and transformers
            has not saved the model again since; or the manifest is damaged.
    """
    try:
        manifest = integrity.read_manifest(folder)
    except integrity.NoManifestError:
        return Digests(frozenset(), f"shapes and values; there is no {integrity.MANIFEST} with digests")
    except integrity.DamagedError as error:
        raise CheckpointError(f"{folder} is damaged: {error}", remedy=_AGAIN) from None
    names = [name for name in manifest.files if used(name)]
    found = {
        name: integrity.content(folder, manifest, [name]) if (folder / name).is_file() else [f"{name} is missing"]
        for name in names
    }
    problems = [problem for listed in found.values() for problem in listed]
    same = frozenset(name for name, listed in found.items() if not listed)
    if not problems:
        return Digests(same, f"digests of {len(same)} files")
    if CONFIG not in same and _saved_again(content, manifest):
        return Digests(
            same, f"shapes and values; transformers saved the model again since {integrity.MANIFEST} was written"
        )
    raise CheckpointError(
        f"{folder} is damaged: {integrity.describe(problems)}",
        remedy=f"{_AGAIN}; if you changed it on purpose, delete {integrity.MANIFEST}",
    )


def _saved_again(content: Mapping[str, Any], manifest: CheckpointManifest) -> bool:
    """Whether transformers has saved the model: `save_pretrained` writes its version into config.json.

    An export has no such entry there.
    """
    return CONFIG in manifest.files and isinstance(content.get("transformers_version"), str)


def check_shapes(files: WeightsByName, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a tensor of another shape than the configuration requires; no values are read.

    Raises:
        CheckpointError: names the first one.
    """
    for name, shape in wanted.items():
        if (found := files.shape(name)) != shape:
            raise CheckpointError(
                f"{files.folder}: {name} does not fit {CONFIG}: it has the shape {found} instead of {shape}",
                remedy=_AGAIN,
            )


def check_values(files: WeightsByName, names: Collection[str], *, whole: Collection[str] = ()) -> None:
    """Refuse tensors with values that no trained model has: not finite, or only zeros. Reads them one by one.

    Args:
        files: the model's weights.
        names: tensors to check.
        whole: files with a correct digest, whose zeros were exported.

    Raises:
        CheckpointError: names the first one and its file.
    """
    for name in sorted(names):
        tensor, file = files.read(name), files.file(name)
        if not torch.isfinite(tensor).all():
            number = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{file} is damaged: {number} of {tensor.numel()} values of {name} are not finite", remedy=_AGAIN
            )
        # Zeros are usually unwritten parts of a file whose space was reserved. A cut-off may be 0, however, and biases
        # may never have been trained.
        may_be_zero = "threshold" in name or name.endswith((".bias", ".router_bias"))
        if not may_be_zero and file.name not in whole and not tensor.any():
            raise CheckpointError(f"{file} is damaged: all values of {name} are zero", remedy=_AGAIN)
