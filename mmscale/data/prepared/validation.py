"""Validation sets (`data.validation`): selects their documents, and checks them in the same way as training data.

It reads manifests. Validation sets are never trained on. No torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import (
    HELD_OUT,
    TRAIN,
    Manifest,
    check_tokenizers,
    check_vocabulary,
    common_tokenizers,
    has_documents,
    most_complete,
    parts_of,
    read_manifest,
)
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError


@dataclass(frozen=True)
class ValidationSet:
    """One set.

    Attributes:
        name: its name in reports.
        folder: written by `mmscale data prepare`.
        manifest: of the folder.
        split: which of its documents are read: the held-out ones, or all if none are held out.
    """

    name: str
    folder: Path
    manifest: Manifest
    split: str

    def describe(self) -> str:
        """One line for the start of a run."""
        documents = self.manifest.splits[self.split].documents
        which = "held-out documents" if self.split == HELD_OUT else "documents, all that it has"
        return f"validation {self.name}: {self.folder}, {documents} {which}"


def read_validation(config: Config, blend: Mapping[Path, Manifest]) -> list[ValidationSet]:
    """The validation sets of a configuration, in its order.

    Args:
        config: names them.
        blend: folders and manifests of the training data.

    Raises:
        DataError: one is missing, damaged, empty, was prepared with another vocabulary or with other tokenizers than
            the training data, or is the training data.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    trained = common_tokenizers({folder: manifest.tokenizers for folder, manifest in blend.items()})
    learned = {
        identity_of(Path(source.path), blend[Path(source.path)]): source.path
        for source in config.data.sources
        if source.trained and config.data.validation
    }
    found = []
    for name, path in config.data.validation.items():
        folder = Path(path)
        with naming(name):
            like = most_complete(blend)
            manifest = read_manifest(folder, like=like)
            check_vocabulary(folder, manifest, vocabulary)
            check_tokenizers(folder, manifest.tokenizers, trained, where="the data that is trained on", like=like)
            split = HELD_OUT if has_documents({folder: manifest}, HELD_OUT) else TRAIN
            parts_of(folder, manifest, split)
            source = learned.get(identity_of(folder, manifest)) if split == TRAIN else None
            if source is not None:
                raise DataError(
                    f"data: {folder} has no held-out documents, and all others are trained on as {source}",
                    remedy="prepare it with data.prepare.held_out above 0, or name other data",
                )
        found.append(ValidationSet(name, folder, manifest, split))
    return found


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of the validation set to errors about its data."""
    setting = f"data.validation.{name}"
    try:
        yield
    except DataError as error:
        cause, remedy = error.cause.removeprefix("data: "), (error.remedy or "").replace("data.path", setting)
        raise DataError(f"{setting}: {cause}", remedy=remedy) from error


def identities_of(sets: Sequence[ValidationSet]) -> list[dict[str, str]]:
    """What checkpoints store about validation sets: name, path, and a hash of the content, independent of the path."""
    return [
        {
            "name": one.name,
            "path": str(one.folder),
            "identity": identity_of(one.folder, one.manifest, split=one.split),
        }
        for one in sets
    ]


def replaced(info: Mapping[str, Any], sets: Sequence[ValidationSet]) -> list[str]:
    """One line for each validation set whose documents have changed since a checkpoint was written.

    Args:
        info: the checkpoint's metadata.
        sets: the present ones.
    """
    before = {one["name"]: one["identity"] for one in info.get("validation", ())}
    return [
        f"data.validation.{one['name']} holds other documents: its losses are not comparable with earlier ones"
        for one in identities_of(sets)
        if before.get(one["name"], one["identity"]) != one["identity"]
    ]
