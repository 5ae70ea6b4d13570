"""Makes the first import of megatron-core cheap on a host without CUDA, whichever module imports it first.

megatron-core wraps functions in `torch.compile` while it is imported, which imports torch._dynamo and torch._inductor:
2.4 seconds of CPU for every process, for functions that are never compiled on such a host. It also imports TensorBoard
for a type annotation. megatron_cpu.py has the other changes for CPUs. This module does not import torch before
megatron-core is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_PACKAGE = "megatron.core"
_UNUSED = ("torch.utils.tensorboard",)  # megatron/core/timers.py imports it in a `try`


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Import megatron-core without `torch.compile` and TensorBoard; without any change if CUDA is available."""
    torch: Any = importlib.import_module("torch")  # not at the top, because every process of mmscale imports this file
    if torch.cuda.is_available():
        yield
        return

    def leave_as_is(model: Any = None, **_: Any) -> Any:
        return model if model is not None else leave_as_is

    hidden = [name for name in _UNUSED if name not in sys.modules]
    original = torch.compile
    torch.compile = leave_as_is
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
        for name in hidden:
            sys.modules.pop(name, None)


class _Finder(MetaPathFinder):
    """Gives `megatron.core` a loader that runs its code under `lean`."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with lean():
            super().exec_module(module)


def install() -> None:
    """Intercept the import of megatron-core. Later calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Stop intercepting the import, to test what megatron-core still needs."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
