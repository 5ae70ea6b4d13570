"""Finds the checkpoint or archive that a user names, and reads its manifest and metadata. No torch, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmscale import bounded
from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import CheckpointManifest, DamagedError, NoManifestError
from mmscale.checkpoint.layout import INFO, Store, is_archive
from mmscale.errors import CheckpointError

ARCHIVE_FORMAT = 2  # 1: bfloat16 and FP8 by private names that zarr-python cannot open; still readable
_READ = (1, 2)
_OTHER_COPY = "use another copy of the archive, or archive the checkpoint again"
OTHER_STEP = "choose another checkpoint: RUN@STEP"


class Described(Protocol):
    """A checkpoint or an archive by its metadata; a `TensorSource` is one."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    def info(self) -> dict[str, Any]:
        """The content of mmscale.json."""
        ...


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint or an archive whose files have the sizes of its manifest.

    Attributes:
        path: its folder.
        step: of the checkpoint.
        manifest: its files.
        metadata: the content of mmscale.json.
    """

    path: Path
    step: int
    manifest: CheckpointManifest
    metadata: dict[str, Any]

    def info(self) -> dict[str, Any]:
        """The content of mmscale.json."""
        return dict(self.metadata)


def find(path: Path, step: int | None = None) -> NamedCheckpoint:
    """The checkpoint or archive of a name on a command line.

    Args:
        path: a run's folder or an archive.
        step: a checkpoint of the run; None: the newest.

    Raises:
        CheckpointError: it does not exist, is damaged by its manifest, or anyone could write it.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", remedy="name a run folder, RUN@STEP, or an archive")
    if is_archive(path):
        found = find_archive(path)
        if step is not None and step != found.step:
            raise CheckpointError(f"{path} is an archive of step {found.step}", remedy=f"name it {path}")
        return found
    store = open_store(path)
    chosen = store.choose(step)
    folder = store.path(chosen)
    with integrity.tolerating_deletion(folder):
        manifest = manifest_of(folder, chosen)
        return NamedCheckpoint(folder, chosen, manifest, store.info(chosen))


def open_store(run: Path) -> Store:
    """The checkpoints of a run.

    Raises:
        CheckpointError: there is no such run, or it has never saved.
    """
    store = Store.of_run(run)
    if not store.root.is_dir():
        raise CheckpointError(
            f"{run} has no folder {store.root.name}/", remedy="name a run folder: `mmscale train` prints it"
        )
    return store


def manifest_of(folder: Path, step: int) -> CheckpointManifest:
    """The manifest of a committed checkpoint, compared with the names and sizes of its files.

    Raises:
        CheckpointError: there is none, it is another step's, files are missing, or anyone could write them.
    """
    integrity.refuse_world_writable(folder)
    try:
        manifest = integrity.read_manifest(folder)
    except NoManifestError:
        raise CheckpointError(
            f"{folder} has no {integrity.MANIFEST}, so it cannot be verified",
            remedy="choose a checkpoint that has one: RUN@STEP",
        ) from None
    except DamagedError as error:
        raise CheckpointError(f"{folder} is damaged: {error}", remedy=OTHER_STEP) from None
    problems = [] if manifest.step == step else [f"{integrity.MANIFEST} belongs to step {manifest.step}"]
    problems += integrity.structure(folder, manifest)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {integrity.describe(problems)}", remedy=OTHER_STEP)
    return manifest


def find_archive(path: Path) -> NamedCheckpoint:
    """An archive, by its manifest and metadata.

    Raises:
        CheckpointError: names or sizes show damage, the version is unknown, or anyone could write it.
    """
    integrity.refuse_world_writable(path)
    try:
        manifest = integrity.read_manifest(path)
    except DamagedError as error:
        raise damaged_archive(path, [str(error)]) from None
    known = [] if INFO in manifest.files else [f"{INFO} is not in the manifest"]
    problems = integrity.structure(path, manifest) or known or integrity.content(path, manifest, [INFO])
    if problems:
        raise damaged_archive(path, problems)
    try:
        metadata = bounded.read_object(path / INFO)
    except (OSError, ValueError) as error:
        raise damaged_archive(path, [f"{INFO}: {error}"]) from None
    found = metadata.get("archive")
    if found is None:
        raise CheckpointError(f"{path} is not an archive", remedy="name a run and a step of it: RUN@STEP")
    if found not in _READ:
        raise CheckpointError(
            f"{path} is an archive of format {found}, this version reads format {ARCHIVE_FORMAT} and older",
            remedy="use the version of mmscale that wrote it",
        )
    return NamedCheckpoint(path, manifest.step, manifest, metadata)


def damaged_archive(path: Path, problems: list[str]) -> CheckpointError:
    """The error for an archive whose files are not those that were written."""
    return CheckpointError(f"{path} is damaged: {integrity.describe(problems)}", remedy=_OTHER_COPY)
