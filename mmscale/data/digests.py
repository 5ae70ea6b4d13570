"""Digests of every file of a prepared data set, and the check of the files against them.

A flipped bit in a `.bin` file is another token, which nothing else detects. This module does not interpret tokens; no
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import xxhash

from mmscale import bounded
from mmscale.errors import DataError

DIGESTS = "digests.json"
_FORMAT = 1
_ALGORITHM = "xxh3_128"
_MOST_BYTES = 1 << 30
_CHUNK = 4 << 20


Seen = dict[tuple[int, int], str]  # digest by device and inode of a file


class Hasher:
    """The digest of a file while it is written."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, content: bytes) -> None:
        """Add bytes."""
        self._state.update(content)

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        return self._state.hexdigest()


def digest_of(file: Path, *, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """The digest of a file, hexadecimal.

    Args:
        file: read in chunks, with the GIL released.
        stopped: called between chunks; if it returns true the result is None.
    """
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            if stopped():
                return None
            state.update(buffer[:count])
    return state.hexdigest()


def text(found: Mapping[str, str]) -> bytes:
    """The content of digests.json.

    Args:
        found: digest of each file by its path relative to the data set's folder.
    """
    content = {"format": _FORMAT, "algorithm": _ALGORITHM, "files": dict(sorted(found.items()))}
    return (json.dumps(content, indent=1) + "\n").encode()


def collect(folder: Path, known: Mapping[str, str], more: Iterable[Path]) -> dict[str, str]:
    """Digests of a data set's files: the known ones, and those of `more` files, which are read."""
    found = dict(known)
    for file in more:
        digest = digest_of(file)
        assert digest is not None
        found[file.relative_to(folder).as_posix()] = digest
    return found


def read(folder: Path) -> dict[str, str] | None:
    """Digests by relative path; None: the data set was written by a version without digests.

    Raises:
        DataError: digests.json is damaged, or of another version.
    """
    file = folder / DIGESTS
    try:
        content = bounded.read_object(file, most=_MOST_BYTES)
        same = (content["format"], content["algorithm"]) == (_FORMAT, _ALGORITHM)
        files = {str(name): str(digest) for name, digest in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, *bounded.BAD_CONTENT) as error:
        raise DataError(f"data: {file} cannot be read: {error!r}", remedy="copy or prepare the data again") from None
    if not same:
        raise DataError(f"data: {file} is of another version", remedy="use the version of mmscale that prepared it")
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]
    if outside:
        raise DataError(
            f"data: {file} names {outside[0]!r}, outside of the data set", remedy="copy or prepare the data again"
        )
    return files


def verify(
    folder: Path,
    wanted: Mapping[str, str],
    *,
    stopped: Callable[[], bool] = lambda: False,
    seen: Seen | None = None,
) -> Iterable[tuple[str, str]]:
    """Files that were altered since they were prepared, with the difference, one by one.

    Args:
        folder: of the data set.
        wanted: from `read`.
        stopped: called between chunks; true: give up.
        seen: digests of files that were read; several names of one file (parts of a Megatron corpus) cost one read.

    Raises:
        OSError: the storage fails to read a file, so its content is unknown.
    """
    seen = {} if seen is None else seen
    for name, digest in wanted.items():
        try:
            state = (folder / name).stat()
            file = state.st_dev, state.st_ino
            found = seen[file] if file in seen else digest_of(folder / name, stopped=stopped)
        except (FileNotFoundError, NotADirectoryError):
            yield name, "is missing"
            continue
        if found is None:
            return
        # Read a second time, because a bit may have flipped in this host's memory or in transit.
        if found != digest and digest_of(folder / name, stopped=stopped) == found:
            yield name, "has another content than was prepared"
        elif found == digest:
            seen[file] = found


def check_path(path: str, what: str) -> None:
    """Refuse a path without a file, or a folder without files; arguments as for `of_path`.

    Raises:
        DataError: there is none.
    """
    if not Path(path).is_file() and not any(file.is_file() for file in Path(path).rglob("*")):
        raise DataError(f"{what}: there is no {path}", remedy="correct the path")


def of_path(path: str | None, what: str) -> str | None:
    """SHA-256 of a file, or of the names and contents of all files of a folder; None if `path` is None.

    Args:
        path: the file or folder.
        what: the setting that names it.

    Raises:
        DataError: it is missing or cannot be read.
    """
    if path is None:
        return None
    check_path(path, what)
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if file != root else ""
        try:
            with file.open("rb") as stream:
                digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"{what}: {file} cannot be read: {error.strerror}", remedy="correct the path") from error
    return digest.hexdigest()
