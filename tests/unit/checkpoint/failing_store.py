"""A store of fsspec's base class whose operations fail on demand. Held in memory, by the class."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class FailingStore(AbstractFileSystem):  # type: ignore[misc]
    """Only what fsspec demands: everything else, such as `isfile` and `find`, is the base class's.

    Attributes:
        files: content, by path.
        failures: what an operation (ls, info, open, rm) raises, and how many times from now on.
    """

    protocol = "failing"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    failures: ClassVar[dict[str, tuple[Exception, int]]] = {}

    @classmethod
    def fail(cls, operation: str, error: Exception, times: int = 1_000_000) -> None:
        """From now on."""
        cls.failures[operation] = (error, times)

    @classmethod
    def reset(cls) -> None:
        """Empty, and in order."""
        cls.files.clear()
        cls.failures.clear()
        fsspec.register_implementation("failing", cls, clobber=True)

    def _may_fail(self, operation: str) -> None:
        error, times = self.failures.get(operation, (None, 0))
        if error is not None and times > 0:
            self.failures[operation] = (error, times - 1)
            raise error

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Files and folders in a folder; a file gives itself."""
        self._may_fail("ls")
        path = str(self._strip_protocol(path)).rstrip("/")
        if path in self.files:
            return [self._entry(path)]
        inside = sorted({self._child(path, name) for name in self.files if name.startswith(f"{path}/")})
        if not inside:
            raise FileNotFoundError(path)
        return [self._entry(name) for name in inside] if detail else inside

    @staticmethod
    def _child(folder: str, name: str) -> str:
        return f"{folder}/{name.removeprefix(f'{folder}/').partition('/')[0]}"

    def _entry(self, path: str) -> dict[str, Any]:
        content = self.files.get(path)
        return {"name": path, "size": len(content or b""), "type": "directory" if content is None else "file"}

    def info(self, path: str, **others: Any) -> Any:
        """As the base class's."""
        self._may_fail("info")
        return super().info(path, **others)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        self._may_fail("open")
        if "w" in mode:
            return _Written(self.files, path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return io.BytesIO(self.files[path])

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete a file or a folder."""
        self._may_fail("rm")
        path = str(self._strip_protocol(path)).rstrip("/")
        gone = [name for name in self.files if name == path or (recursive and name.startswith(f"{path}/"))]
        if not gone:
            raise FileNotFoundError(path)
        for name in gone:
            del self.files[name]


class _Written(io.BytesIO):
    """Appears in the store when it is committed."""

    def __init__(self, files: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._files, self._path, self._content = files, path, b""

    def close(self) -> None:
        if not self.closed:
            self._content = self.getvalue()
        super().close()

    def commit(self) -> None:
        self._files[self._path] = self._content

    def discard(self) -> None:
        super().close()
