"""Document files, on a file system or an object store (`s3://`, `gs://`, whatever fsspec opens).

A remote file is read in blocks: the next one is fetched while the current one is used, and failed fetches are retried.
"""

from __future__ import annotations

import functools
import importlib
import io
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Resolver, clean, folder_resolver
from mmscale.errors import DataError

READ_BYTES = 1 << 20
BLOCK = 8 << 20  # bytes of a fetch
TRIES = 5
PAUSE = 0.5  # seconds before the second try; doubled before each further one
# Names, in various stores, of a property that changes with the content.
_VERSIONS = ("ETag", "etag", "md5Hash", "sha256", "mtime", "created")
MOST_ITEM = 256 << 20  # largest file that a document may name [bytes]


@dataclass(frozen=True)
class RemoteFile:
    """A file on an object store, with the attributes and methods of a Path that readers use.

    Attributes:
        url: with its protocol.
        size: bytes.
        version: changes with the content: an ETag, a digest or a time.
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """As for a Path."""
        return Path(self.name).suffix

    def open(self, mode: str = "rb", buffering: int = READ_BYTES) -> BinaryIO:
        """Open the file for reading; it is seekable."""
        assert mode == "rb"
        return io.BufferedReader(_Blocks(self), buffering)

    def __str__(self) -> str:
        """The URL."""
        return self.url


File = Path | RemoteFile


def is_remote(pattern: str) -> bool:
    """Whether a name is a URL."""
    return "://" in pattern


def list_remote(pattern: str) -> list[RemoteFile]:
    """Files that a URL names; globs are sorted.

    Raises:
        DataError: fsspec or the package for the protocol is missing, or the store cannot be reached.
    """
    protocol = pattern.partition("://")[0]
    system = _system(protocol)
    try:
        if not any(letter in pattern for letter in "*?["):
            found = [pattern] if _tried(lambda: system.isfile(pattern)) else []
        else:
            found = [system.unstrip_protocol(name) for name in sorted(_tried(lambda: system.glob(pattern)))]
        return [_stated(system, url) for url in found if not url.endswith("/")]
    except Exception as error:  # packages of stores raise all kinds of errors
        raise DataError(
            f"data.prepare: {pattern} cannot be listed: {type(error).__name__}: {error}",
            remedy="see the store's own variables for credentials and addresses (FSSPEC_S3_ENDPOINT_URL, AWS_PROFILE)",
        ) from error


def _stated(system: Any, url: str) -> RemoteFile:
    info = _tried(lambda: system.info(url))
    version = next((str(info[key]) for key in _VERSIONS if key in info), "")
    return RemoteFile(url, int(info["size"]), version)


@functools.cache
def _system(protocol: str) -> Any:
    """The file system of a protocol; fsspec reads its settings from FSSPEC_* variables and its own files."""
    try:
        return importlib.import_module("fsspec").filesystem(protocol)
    except (ModuleNotFoundError, ImportError) as error:
        raise DataError(
            f"data.prepare: {protocol}:// needs a package: {error}",
            remedy="pip install fsspec and the package for the store: s3fs, gcsfs, adlfs, ...",
        ) from error
    except ValueError as error:
        raise DataError(f"data.prepare: {protocol}:// is not known: {error}", remedy="correct documents") from error


def _tried(call: Callable[[], Any]) -> Any:
    """The result of a call, which is retried after errors that may be temporary.

    Raises:
        OSError: of the last attempt.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


class _Blocks(io.RawIOBase):
    """A remote file, read in blocks with one block of read-ahead."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0
        self._system = _system(file.url.partition("://")[0])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._block, self._number = b"", -1
        self._next: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.size:
            return 0
        number, start = divmod(self._at, BLOCK)
        if number != self._number:
            self._block, self._number = self._fetched(number), number
            if (number + 1) * BLOCK < self._file.size:
                self._next = number + 1, self._thread.submit(self._fetch, number + 1)
        some = self._block[start : start + len(buffer)]
        buffer[: len(some)] = some
        self._at += len(some)
        return len(some)

    def _fetched(self, number: int) -> bytes:
        ahead, self._next = self._next, None
        return ahead[1].result() if ahead is not None and ahead[0] == number else self._fetch(number)

    def _fetch(self, number: int) -> bytes:
        start, end = number * BLOCK, min(self._file.size, (number + 1) * BLOCK)
        content: bytes = _tried(lambda: self._system.cat_file(self._file.url, start=start, end=end))
        if len(content) != end - start:
            raise OSError(f"{self._file.url} has changed: {len(content)} bytes instead of {end - start} at {start}")
        return content

    def close(self) -> None:
        if not self.closed:
            self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()


def resolver_of(file: File) -> Resolver:
    """Finds items that the documents of a file name, relative to the file's folder."""
    return folder_resolver(file.parent) if isinstance(file, Path) else _remote_resolver(file)


def _remote_resolver(file: RemoteFile) -> Resolver:
    """Fetches items by names relative to the folder of a remote file; names that leave the folder are refused."""
    folder, system = file.url.rsplit("/", 1)[0], _system(file.url.partition("://")[0])

    def resolve(path: str) -> bytes:
        clean(path, "image path")
        parts = path.split("/")
        if not path or path.startswith("/") or ".." in parts or "\0" in path or is_remote(path):
            raise BadDocumentError(f"image path {path[:200]} leaves the folder of its document file")
        url = f"{folder}/{path}"
        try:
            if (size := int(_tried(lambda: system.info(url))["size"])) > MOST_ITEM:
                raise BadDocumentError(f"image {path} has {size:,} bytes, more than {MOST_ITEM:,}")
            content: bytes = _tried(lambda: system.cat_file(url))
        except FileNotFoundError as error:
            raise BadDocumentError(f"image {path} is missing") from error
        return content

    return resolve


def state_of(file: File, name: str) -> str:
    """Size and time of an item next to a document file; "none" if it is missing."""
    try:
        if isinstance(file, Path):
            status = (file.parent / name).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        found = _stated(_system(file.url.partition("://")[0]), f"{file.url.rsplit('/', 1)[0]}/{name}")
        return f"{found.size} {found.version}"
    except (OSError, ValueError):  # missing, or not a valid file name
        return "none"


def version_of(file: File) -> str:
    """The present size and time of a file; "none" if it is gone."""
    try:
        if isinstance(file, Path):
            status = file.stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        system = _system(file.url.partition("://")[0])
        system.invalidate_cache()
        found = _stated(system, file.url)
        return f"{found.size} {found.version}"
    except FileNotFoundError:
        return "none"


def size_of(file: File) -> int:
    """Size of a file [bytes]."""
    return file.stat().st_size if isinstance(file, Path) else file.size
