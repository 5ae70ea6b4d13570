"""Refuses a folder or file of the user that Python would import in place of one of mmscale's packages.

`launch`, `slurm` and `checkpoints_tools` are top-level packages with names that other projects use too. Without this
check such a project stops in the middle of a command, with an ImportError of a module that exists.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import mmscale
from mmscale.errors import UsageError

PACKAGES = ("launch", "slurm", "checkpoints_tools")


def refuse_shadowed() -> None:
    """Check where Python would import each package from; nothing is imported.

    In a checkout, in a wheel and in the archive of a launch the packages are beside mmscale.

    Raises:
        UsageError: another place comes first.
    """
    beside = Path(mmscale.__file__).parents[1]
    for name in PACKAGES:
        found = _place(importlib.util.find_spec(name))
        if found is not None and found != beside / name and not _same(found, beside / name):
            raise UsageError(
                f"{found} hides mmscale's own package {name!r} ({beside / name}): both have the same name",
                remedy=f"rename it, or keep {found.parent} off Python's path: unset PYTHONPATH, and start `mmscale` or "
                "`python -P -m mmscale` instead of `python -m mmscale`",
            )


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder of a package, also of one without __init__.py, or the file of a module; None: there is none."""
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    return Path(next(iter(spec.submodule_search_locations)))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
