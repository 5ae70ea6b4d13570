"""Digests of every file of a checkpoint: MANIFEST.json, and whether a folder still is what it says.

Reads and hashes bytes; knows no tensors (no torch), renames nothing. Who hashes which file, `deal` says.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mmscale.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1
ALGORITHM = "xxh3_128"  # finds every accident at the speed of memory; it is no signature against an attacker
_CHUNK = 4 << 20


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the text names the file."""


class NoManifestError(DamagedError):
    """There is no manifest: it was deleted, or an older version wrote the checkpoint."""


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written.

    Attributes:
        size: bytes.
        digest: xxh3_128 of its content, hexadecimal.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of, and where it comes from.

    Attributes:
        step: optimizer steps done.
        attempt: attempt of the run that wrote it.
        config_digest: digest of the configuration.
        code_version: version of mmscale, and the commit where it is known.
        topology: ranks of each dimension, e.g. {"world_size": 4, "tp": 2}.
        files: every file but the manifest by its path relative to the folder.
        origin: how it was made of others, e.g. {"made_by": "average", "parents": [...]}; None: ranks wrote it.
    """

    step: int
    attempt: int
    config_digest: str
    code_version: str
    topology: dict[str, int]
    files: dict[str, FileRecord]
    algorithm: str = ALGORITHM
    format: int = FORMAT
    origin: dict[str, Any] | None = None

    def text(self) -> str:
        """The content of MANIFEST.json. Equal manifests have equal text, so that any changed byte shows."""
        fields = asdict(self)
        if self.origin is None:
            del fields["origin"]
        body = json.dumps(fields, indent=1, sort_keys=True)
        whole = {"manifest": json.loads(body), "digest": text_digest(body)}
        return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def text_digest(text: str) -> str:
    """xxh3_128 of a text, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        NoManifestError: there is none.
        DamagedError: it cannot be read, or a byte of it was changed.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NoManifestError(f"{MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error}") from None
    try:
        parsed = json.loads(text)["manifest"]
        files = {name: FileRecord(**record) for name, record in parsed.pop("files").items()}
        manifest = Manifest(files=files, **parsed)
        same = manifest.text() == text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{MANIFEST} is damaged") from None
    if not same:
        raise DamagedError(f"{MANIFEST} is damaged: its own digest does not fit")
    if manifest.format != FORMAT or manifest.algorithm != ALGORITHM:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {manifest.format} with {manifest.algorithm}, "
            f"this version reads format {FORMAT} with {ALGORITHM}",
            remedy="use the version of mmscale that wrote it",
        )
    return manifest


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder by relative path, without the manifest.

    Raises:
        DamagedError: something is neither a file nor a folder: links would lead out of the checkpoint.
    """
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        if stat.S_ISREG(status.st_mode):
            found[name] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise DamagedError(f"{name} is neither a file nor a folder")
    found.pop(MANIFEST, None)
    return found


def deal(files: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names of files in `parts` lists of nearly equal bytes: the largest first, each to whoever has least."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    load = [0] * parts
    for name in sorted(files, key=lambda name: (-files[name], name)):
        least = load.index(min(load))
        dealt[least].append(name)
        load[least] += files[name] + _CHUNK // 64  # opening a file costs too
    return dealt


def digest(path: Path) -> FileRecord:
    """Size and digest of a file, read in chunks."""
    state, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return FileRecord(size, state.hexdigest())


def digests(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and digest of some files of a folder."""
    return {name: digest(folder / name) for name in names}


def structure(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong without reading any content: missing files, extra files, other sizes."""
    try:
        present = sizes(folder)
    except (DamagedError, OSError) as error:
        return [str(error)]
    wanted = manifest.files
    problems = [f"{name} is missing" for name in wanted if name not in present]
    problems += [f"{name} is not in the manifest" for name in present if name not in wanted]
    for name in wanted:
        if name in present and present[name] != wanted[name].size:
            problems.append(f"{name} has {present[name]} bytes instead of {wanted[name].size}")
    return problems


def content(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Which of these files hold something else than what was written."""
    problems = []
    for name in names:
        try:
            if digest(folder / name) != manifest.files[name]:
                problems.append(f"{name} has another content than what was written")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def verify(folder: Path, *, step: int | None = None) -> list[str]:
    """Everything that is wrong with a checkpoint, by one process; empty if it is whole.

    Args:
        folder: the checkpoint.
        step: the step that its name says.

    Raises:
        NoManifestError: nothing can be told about it.
    """
    try:
        manifest = read_manifest(folder)
    except NoManifestError:
        raise
    except DamagedError as error:
        return [str(error)]
    if step is not None and manifest.step != step:
        return [f"{MANIFEST} belongs to step {manifest.step}"]
    return structure(folder, manifest) or content(folder, manifest, manifest.files)


def require_whole(folder: Path, *, step: int, allow_missing: bool = False) -> None:
    """Refuse a damaged checkpoint; it stays where it is.

    Args:
        folder: the checkpoint.
        step: the step that its name says.
        allow_missing: a checkpoint without a manifest is taken as it is.

    Raises:
        CheckpointError: it is damaged, has no manifest, or can be written by everyone.
    """
    refuse_world_writable(folder)
    try:
        problems = verify(folder, step=step)
    except NoManifestError:
        if allow_missing:
            return
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so nobody can tell whether it is whole",
            remedy="choose a checkpoint that has one (RUN@STEP), or set checkpoint.allow_missing: true in the run's "
            "config.yaml to use it anyway",
        ) from None
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {describe(problems)}", remedy="choose another checkpoint: RUN@STEP"
        )


def refuse_world_writable(folder: Path) -> None:
    """Anyone could have put anything into such a checkpoint, with a manifest that fits.

    Raises:
        CheckpointError: a folder or file of the checkpoint, or the folder around it, can be written by everyone.
    """
    for path in (folder.parent, folder, *sorted(folder.rglob("*"))):
        mode = path.lstat().st_mode
        if mode & stat.S_IWOTH and not stat.S_ISLNK(mode):
            raise CheckpointError(
                f"{path} can be written by every user of this machine, so anyone may have changed the checkpoint",
                remedy=f"make sure that it is yours, then `chmod -R o-w {folder.parent}`",
            )


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(problems: Iterable[str], *, most: int = 3) -> str:
    """The first few problems in one line."""
    listed = list(problems)
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
