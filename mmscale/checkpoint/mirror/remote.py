"""The folder of a mirror, through fsspec: list, write, read and delete. It knows names and sizes, but not checkpoints.

Credentials come from the environment or the provider's own files, as fsspec's file systems look for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from mmscale import bounded
from mmscale.checkpoint.integrity import MANIFEST
from mmscale.errors import ConfigError
from mmscale.tables.mirror_urls import FILES, protocol_of

CHUNK = 4 << 20  # bytes of a read and of a write
# File systems whose folders have to be created. Not object stores, where creating a folder may create a bucket.
_WITH_FOLDERS = ("memory", "sftp", "ssh", "ftp", "hdfs", "smb")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Pace:
    """Limits the bytes per second of all threads together.

    Args:
        bandwidth: bytes per second; 0: unlimited.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        if not self.bandwidth:
            return
        with self._lock:
            begins = max(self._free_at, time.monotonic())
            self._free_at = begins + count / self.bandwidth
        time.sleep(max(0.0, begins - time.monotonic()))


def require_package(url: str) -> None:
    """Refuse a store for which no package is installed.

    Raises:
        ConfigError: it cannot be the URL of a mirror, fsspec does not know the protocol, or its package is missing.
    """
    import fsspec

    protocol = protocol_of(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise ConfigError(f"{url}: fsspec knows no store {protocol}://", remedy="use s3://, gs:// or file://") from None
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        raise ConfigError(
            f"{protocol}:// cannot be used: {error}",
            remedy=f"pip install {package}" if package else "install the package that fsspec names",
        ) from None


class Remote:
    """A folder in a store.

    Args:
        url: of the folder; it need not exist.
        pace: limits writes and reads.
    """

    def __init__(self, url: str, *, pace: Pace | None = None) -> None:
        import fsspec.core

        require_package(url)
        options = {"auto_mkdir": True} if protocol_of(url) in FILES else {}
        self.url = url.rstrip("/")
        self.pace = pace or Pace(0.0)
        self.store, path = fsspec.core.url_to_fs(self.url, **options)
        self.root = str(path).rstrip("/")
        self._makes_folders = protocol_of(url) in _WITH_FOLDERS

    def folders(self) -> list[str]:
        """Names of the folders in it; none if it does not exist."""
        self.store.invalidate_cache()
        try:
            entries = self.store.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        paths = [str(entry["name"]).rstrip("/") for entry in entries if entry["type"] == "directory"]
        return sorted(path.rpartition("/")[2] for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file of a folder, by its path in there; none if it does not exist."""
        self.store.invalidate_cache()
        prefix = f"{self.root}/{folder}/"
        found: dict[str, int] = {}
        below = [prefix.rstrip("/")]
        while below:  # not `find`, which silently omits folders that the store fails to list
            path = below.pop()
            try:
                entries = self.store.ls(path, detail=True)
            except FileNotFoundError:
                continue
            for entry in entries:
                name = str(entry["name"]).rstrip("/")
                if entry["type"] == "directory" and name.startswith(f"{path}/"):
                    below.append(name)
                elif entry["type"] == "file" and name.startswith(prefix):
                    found[name.removeprefix(prefix)] = int(entry["size"])
        return found

    def is_complete(self, folder: str) -> bool:
        """Whether it has its manifest, which is written last.

        If the store fails, the answer is unknown and this raises.

        Raises:
            Exception: of the store.
        """
        self.store.invalidate_cache()
        try:
            # Not `isfile` or `exists`, which return False after any error; a complete checkpoint would then be deleted.
            return bool(self.store.info(f"{self.root}/{folder}/{MANIFEST}")["type"] == "file")
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file that appears in the store, complete, at the end of the context; after an error it does not appear."""
        path = f"{self.root}/{name}"
        if self._makes_folders:
            self.store.makedirs(path.rpartition("/")[0], exist_ok=True)
        # Without autocommit=False, closing the file after an error would publish the part written so far.
        file: Any = self.store.open(path, "wb", autocommit=False)
        try:
            yield _Paced(file, self.pace)  # type: ignore[misc]
            file.close()
            file.commit()
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        with self.writing(name) as file:
            file.write(text.encode())

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, in order."""
        with self.store.open(f"{self.root}/{name}", "rb", block_size=CHUNK) as file:
            while chunk := file.read(CHUNK):
                self.pace.wait(len(chunk))
                yield chunk

    def read_text(self, name: str) -> str:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is too large, or not text.
        """
        with self.store.open(f"{self.root}/{name}", "rb") as file:
            content = file.read(bounded.MOST_BYTES + 1)
        if len(content) > bounded.MOST_BYTES:
            raise ValueError(f"larger than {bounded.MOST_BYTES} bytes")
        return str(content.decode("utf-8"))

    def remove(self, folder: str) -> None:
        """Delete a folder, its manifest first, so that the rest counts as incomplete if the process is killed."""
        with contextlib.suppress(FileNotFoundError):
            self.store.rm(f"{self.root}/{folder}/{MANIFEST}")
        self.store.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self.store.rm(f"{self.root}/{folder}", recursive=True)


class _Paced:
    """A file whose writes are limited by a `Pace`."""

    def __init__(self, file: IO[bytes], pace: Pace) -> None:
        self._file, self._pace = file, pace

    def write(self, chunk: bytes) -> int:
        self._pace.wait(len(chunk))
        return self._file.write(chunk)
