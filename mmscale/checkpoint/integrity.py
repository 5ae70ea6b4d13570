"""The manifest of a checkpoint: digests of all files, and the check of a folder against them.

It reads and hashes bytes, without knowledge of tensors (no torch), and renames nothing. `deal` assigns files to ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from mmscale import bounded
from mmscale.errors import CheckpointError, shell_command

MANIFEST = "MANIFEST.json"
SIGNATURE = "MANIFEST.json.sig"  # the manifest's signature, made by signing.py; not part of the manifest
FORMAT = 1
ALGORITHM = "xxh3_128"  # detects accidental changes at the speed of memory; does not protect against an attacker
_CHUNK = 4 << 20
PAUSES_S = (0.1, 1.0, 4.0)  # between reads of a file after storage errors: a stale handle is valid again after one
T = TypeVar("T")


class DamagedError(Exception):
    """A checkpoint does not match its manifest; the text names the file."""


class UnreadableError(CheckpointError):
    """A file cannot be read on this host at the moment, which does not show whether it is damaged."""


class DeletedError(CheckpointError):
    """A checkpoint was deleted while it was read."""


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
class CheckpointManifest:
    """The files of a complete checkpoint, and its origin.

    Attributes:
        step: optimizer steps done.
        attempt: attempt of the run that wrote it.
        config_digest: digest of the configuration.
        code_version: version of mmscale, with the commit if known.
        topology: ranks of each dimension, e.g. {"world_size": 4, "tp": 2}.
        files: every file except the manifest by its path relative to the folder.
        origin: how it was made from others, e.g. {"made_by": "average", "parents": [...]}; None: ranks wrote it.
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
        """The content of MANIFEST.json. Equal manifests have equal text, so that any changed byte is detected."""
        fields = asdict(self)
        if self.origin is None:
            del fields["origin"]
        body = json.dumps(fields, indent=1, sort_keys=True)
        whole = {"manifest": bounded.parse_json(body), "digest": text_digest(body)}
        return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def text_digest(text: str) -> str:
    """xxh3_128 of a text, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def with_retries(read: Callable[[], T], *, path: Path) -> T:
    """The result of a read, which is retried after PAUSES_S if it fails.

    Raises:
        UnreadableError: it failed every time.
        FileNotFoundError, IsADirectoryError, NotADirectoryError: there is no such file.
    """
    for pause in (*PAUSES_S, None):
        try:
            return read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if pause is None:
                raise UnreadableError(
                    f"{path} cannot be read on {socket.gethostname()}: {error.strerror or error}",
                    remedy="check the file system and start again: the checkpoint may well be whole. If the file is "
                    f"lost, rename the folder {path.parent.name} to resume from the checkpoint before it",
                ) from None
        time.sleep(pause)
    raise AssertionError


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        NoManifestError: there is none.
        DamagedError: it was changed.
        UnreadableError: a storage error.
        CheckpointError: another version of mmscale wrote it, in an unknown format.
    """
    file = folder / MANIFEST
    try:
        text = with_retries(lambda: bounded.read_text(file), path=file)
    except FileNotFoundError:
        raise NoManifestError(f"{MANIFEST} is missing") from None
    except (ValueError, IsADirectoryError) as error:  # not UTF-8, far too large, or not a file
        raise DamagedError(f"{MANIFEST} is damaged: {error}") from None
    return parse_manifest(text, where=file)


def parse_manifest(text: str, *, where: Path | str) -> CheckpointManifest:
    """The manifest in a text; `where` it was read, for messages. Errors as in `read_manifest`."""
    _refuse_other_format(where, text)
    try:
        parsed = bounded.parse_json(text)["manifest"]
        files = {name: FileRecord(**record) for name, record in parsed.pop("files").items()}
        manifest = CheckpointManifest(files=files, **parsed)
        same = manifest.text() == text
    except bounded.BAD_CONTENT:
        raise DamagedError(f"{MANIFEST} is damaged") from None
    if not same:
        raise DamagedError(f"{MANIFEST} is damaged: its own digest does not fit")
    return manifest


def _refuse_other_format(file: Path | str, text: str) -> None:
    """Refuse a manifest of a newer version, whatever fields it has, before it is parsed with the present format.

    Its digest covers the text of `manifest` as stored, so damage is not mistaken for a newer version.
    """
    try:
        whole = bounded.parse_json(text)
        body = whole["manifest"]
        found = (body["format"], body["algorithm"])
        intact = whole["digest"] == text_digest(json.dumps(body, indent=1, sort_keys=True))
    except bounded.BAD_CONTENT:
        return  # damaged; the caller will detect it
    if intact and found != (FORMAT, ALGORITHM):
        raise CheckpointError(
            f"{file} has format {found[0]} with {found[1]}, this version reads format {FORMAT} with {ALGORITHM}",
            remedy="use the version of mmscale that wrote it",
        )


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder by relative path, without the manifest and its signature.

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
    for beside in (MANIFEST, SIGNATURE):
        found.pop(beside, None)
    return found


def deal(files: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names of files in `parts` lists of nearly equal bytes: the largest first, each to the list with fewest bytes."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    load = [0] * parts
    for name in sorted(files, key=lambda name: (-files[name], name)):
        least = load.index(min(load))
        dealt[least].append(name)
        load[least] += files[name] + _CHUNK // 64  # opening a file has a cost too
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


def structure(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """Problems that can be found without reading contents: missing files, extra files, other sizes.

    Raises:
        UnreadableError: the folder cannot be listed, or two listings differ.
    """
    problems = _structure(folder, manifest)
    if problems:
        time.sleep(PAUSES_S[0])
        if _structure(folder, manifest) != problems:
            raise UnreadableError(
                f"{folder} is listed differently every time on {socket.gethostname()}",
                remedy="check the file system and start again: the checkpoint may well be whole",
            )
    return problems


def _structure(folder: Path, manifest: CheckpointManifest) -> list[str]:
    try:
        present = with_retries(lambda: sizes(folder), path=folder / MANIFEST)
    except (DamagedError, FileNotFoundError, NotADirectoryError) as error:
        return [str(error)]
    wanted = manifest.files
    problems = [f"{name} is missing" for name in wanted if name not in present]
    problems += [f"{name} is not in the manifest" for name in present if name not in wanted]
    for name in wanted:
        if name in present and present[name] != wanted[name].size:
            problems.append(f"{name} has {present[name]} bytes instead of {wanted[name].size}")
    return problems


def content(folder: Path, manifest: CheckpointManifest, names: Iterable[str]) -> list[str]:
    """Files whose content differs from what was written, confirmed by two equal reads.

    The second read bypasses the page cache, because this host's memory may be at fault.

    Raises:
        UnreadableError: a file cannot be read, or two reads of it differ.
    """
    problems = []
    for name in names:
        file = folder / name
        first = _read(file, fresh=False)
        if first == manifest.files[name]:
            continue
        if first != _read(file, fresh=True):
            raise UnreadableError(
                f"{file} reads differently every time on {socket.gethostname()}",
                remedy="check the memory and the storage of this host; the checkpoint may well be whole",
            )
        problems.append(f"{name} has another content than what was written")
    return problems


def _read(file: Path, *, fresh: bool) -> FileRecord:
    """The digest of a file; fresh: not from the page cache, if the kernel can drop it."""

    def read() -> FileRecord:
        if fresh:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return digest(file)

    try:
        return with_retries(read, path=file)
    except (FileNotFoundError, NotADirectoryError):  # it existed when the folder was listed, perhaps on another host
        raise UnreadableError(
            f"{file} is not there on {socket.gethostname()}",
            remedy="check that this host has the file system of the run mounted; the checkpoint may well be whole",
        ) from None


def verify(folder: Path, *, step: int | None = None) -> list[str]:
    """All problems of a checkpoint, found by one process; empty if it is intact.

    Args:
        folder: the checkpoint.
        step: the step in its name.

    Raises:
        NoManifestError: it has no manifest.
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


def require_intact(folder: Path, *, step: int, allow_missing: bool = False) -> None:
    """Refuse a damaged checkpoint, without renaming it.

    Args:
        folder: the checkpoint.
        step: the step in its name.
        allow_missing: accept a checkpoint without a manifest.

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
            f"{folder} has no {MANIFEST}, so it cannot be verified",
            remedy="choose a checkpoint that has one (RUN@STEP), or set checkpoint.allow_missing: true in the run's "
            "config.yaml to use it anyway",
        ) from None
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {describe(problems)}", remedy="choose another checkpoint: RUN@STEP"
        )


@contextlib.contextmanager
def tolerating_deletion(folder: Path) -> Iterator[None]:
    """Read a checkpoint that its run may delete meanwhile (`checkpoint.keep`); files missing then are not damage.

    Raises:
        DeletedError: reading failed, and the folder does not exist any more.
    """
    try:
        yield
    except (DamagedError, CheckpointError, OSError) as error:
        if isinstance(error, DeletedError) or folder.exists():
            raise
        raise deleted(folder) from error


def deleted(folder: Path) -> DeletedError:
    """The error for a checkpoint that does not exist any more."""
    return DeletedError(
        f"{folder} was deleted while it was read",
        remedy="a run keeps its newest checkpoints only (checkpoint.keep): choose a newer one, RUN@STEP",
    )


def refuse_world_writable(folder: Path) -> None:
    """Refuse a checkpoint that everyone can write to, because anyone could have replaced files and manifest.

    Raises:
        CheckpointError: a folder or file of the checkpoint, or the folder around it, can be written by everyone; or its
            run has deleted it meanwhile.
    """
    with tolerating_deletion(folder):
        for path in (folder.parent, folder, *sorted(folder.rglob("*"))):
            mode = path.lstat().st_mode
            if mode & stat.S_IWOTH and not stat.S_ISLNK(mode):
                protected = shell_command("-R", "o-w", folder.parent, program="chmod")
                raise CheckpointError(
                    f"{path} can be written by every user of this machine, so anyone may have changed the checkpoint",
                    remedy=f"make sure that it is yours, then {protected}",
                )


def describe(problems: Iterable[str], *, most: int = 3) -> str:
    """The first few problems in one line."""
    listed = list(problems)
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
