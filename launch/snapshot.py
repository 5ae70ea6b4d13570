"""Snapshots of the code.

The snapshot of mmscale's packages in a launch folder: one archive that Python imports from. No torch.

A folder would be 350 files per launch, which thousands of ranks would look up one by one. A zip archive is one file
that each node reads once and then caches. A rank keeps its table of contents in memory, so looking up modules that are
not in it needs no file system. The archive also contains byte code, because Python does not cache what it compiles from
an archive; another version of Python, such as a container's, uses the sources.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import marshal
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

import mmscale
from mmscale.errors import LaunchError
from mmscale.runtime.atomic_files import open_atomic

PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")
# No job runs these, and wheels do not have them either (pyproject.toml).
LEFT_OUT = ("mmscale/bench", "slurm/local")
_IGNORED = ("__pycache__",)
_SUFFIXES = (".pyc", ".tmp")
# Byte code that is never compared with its source (PEP 552): both are in the archive, which does not change.
_UNCHECKED = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write(archive: Path, packages: Iterable[str] = PACKAGES) -> None:
    """Write the current packages, including uncommitted edits.

    Args:
        archive: file to write; it gets its name when it is complete.
        packages: top-level packages.

    Raises:
        LaunchError: a source does not parse.
    """
    root = Path(mmscale.__file__).parent.parent
    # Not compressed: many processes read parts of it at the same time, and 5 MB are small for a file system.
    with open_atomic(archive) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as opened:
        for file in _files(root, packages):
            name = file.relative_to(root).as_posix()
            opened.writestr(zipfile.ZipInfo(name, _EPOCH), file.read_bytes())
            if file.suffix == ".py":
                code = _shown_as(_code(file, file.stat().st_mtime_ns, name), f"{archive}/{name}")
                opened.writestr(zipfile.ZipInfo(f"{name}c", _EPOCH), _UNCHECKED + marshal.dumps(code))


def _files(root: Path, packages: Iterable[str]) -> Iterator[Path]:
    for package in packages:
        for file in sorted((root / package).rglob("*")):
            if not file.is_file() or file.suffix in _SUFFIXES or set(_IGNORED) & set(file.parts):
                continue
            if not any(file.is_relative_to(root / folder) for folder in LEFT_OUT):
                yield file


@functools.cache
def _code(file: Path, modified: int, name: str) -> CodeType:
    """The byte code of a source file, from Python's own cache if that is current; cached for the runs of a sweep.

    Args:
        file: the source.
        modified: its modification time [ns], which identifies its version.
        name: its path in the archive.

    Raises:
        LaunchError: it does not parse.
    """
    loader = importlib.machinery.SourceFileLoader(name.removesuffix(".py").replace("/", "."), str(file))
    try:
        code = loader.get_code(loader.name)
    except SyntaxError as error:
        raise LaunchError(f"{file} does not parse: {error}", remedy="ranks would not either: correct it") from None
    assert code is not None
    return code


def _shown_as(code: CodeType, path: str) -> CodeType:
    """The same code, with this path in tracebacks."""
    constants = tuple(_shown_as(one, path) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.replace(co_filename=path, co_consts=constants)
