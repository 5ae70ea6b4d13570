"""Transformer-Engine's own Python on a CPU: plain torch in place of its compiled functions and of `torch.cuda`.

    from tests.te_on_cpu import install
    install.install()              # before transformer_engine or megatron-core is imported

What runs then is Transformer-Engine 2.11's Python: constructors, autograd functions, FP8 state and recipes, which data
is made row- and column-wise, weight caches, fused gradient accumulation, attention's choice of backend, FusedAdam, and
megatron-core's wrappers over all of it. What does not run are its kernels; FP8 is computed by formula. Functions that
are missing refuse when they are called.

The package's Python is a wheel of 0.7 MB on PyPI. `make` unpacks it into a folder that is on no path (package.py), and
only processes that call `install` may put it on theirs: elsewhere megatron-core would find a Transformer-Engine that
cannot be imported, and could not be imported itself.

Two ways of use:
    install()                  torch stays as it is; only transformer_engine's modules see a GPU. For mmscale's CPU
                               adaptor of megatron-core.
    install(everywhere=True)   torch itself says that there is a GPU: for code that takes its CUDA branches.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Iterator

import torch

from tests.te_on_cpu import package, pretended_gpu
from tests.te_on_cpu.compiled import Compiled, compiled


@contextlib.contextmanager
def _building() -> Iterator[None]:
    """Makes the package skip the search for its libraries, as when it is being built."""
    before = os.environ.get("NVTE_PROJECT_BUILDING")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        yield
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]
        if before is not None:
            os.environ["NVTE_PROJECT_BUILDING"] = before


@contextlib.contextmanager
def _empty(names: Iterable[str]) -> Iterator[None]:
    """Empty modules for packages that Transformer-Engine imports and does not use here; not visible to others."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    sys.modules.update({name: Compiled(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _import() -> types.ModuleType:
    """Import the package without the checks and libraries that it needs when it is imported."""
    if "transformer_engine" in sys.modules:
        raise RuntimeError("install() comes before the first import of transformer_engine")
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("Transformer-Engine's Python is not on sys.path", name="transformer_engine")
    made = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = made
    sys.modules["transformer_engine_torch"] = compiled()
    # Unused parts of the package, whose imports may be missing: export, and kernels in Triton.
    if importlib.util.find_spec("onnxscript") is None:
        sys.modules["transformer_engine.pytorch.onnx_extensions"] = Compiled("onnx_extensions")
    if importlib.util.find_spec("triton") is None:
        kernels = sorted((package.WHEEL / "transformer_engine" / "pytorch" / "triton").glob("[!_]*.py"))
        for name in ("triton", *(f"triton.{kernel.stem}" for kernel in kernels)):
            sys.modules[f"transformer_engine.pytorch.{name}"] = Compiled(name)
        sys.modules["transformer_engine.pytorch.triton"].__path__ = []  # type: ignore[attr-defined]
    with _building(), _empty(("einops", "pydantic")):
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        spec.loader.exec_module(made)
        # Imported separately, because the package hides the reason if this import fails.
        importlib.import_module("transformer_engine.pytorch")
    return made


def rebind() -> None:
    """Bind the `torch` with a GPU in modules of Transformer-Engine that were imported since."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "transformer_engine" and module is not None and vars(module).get("torch") is torch:
            module.__dict__["torch"] = pretended_gpu.proxy()


def install(*, everywhere: bool = False) -> types.ModuleType:
    """Import Transformer-Engine so that it runs here. Once per process.

    Args:
        everywhere: torch reports a GPU to all modules.

    Returns:
        The package transformer_engine.

    Raises:
        ModuleNotFoundError: the package is not on sys.path.
        RuntimeError: it was imported before.
    """
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")  # its small functions as they are, without a compiler
    if everywhere:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # do not compile for a GPU that does not exist
    made = _import()
    importlib.import_module("transformer_engine.pytorch.fp8")
    importlib.import_module("transformer_engine.pytorch.optimizers")
    state = importlib.import_module("transformer_engine.pytorch.distributed")
    state._lazy_init, state._lazy_call = (lambda: None), (lambda function, **_: function())
    pretended_gpu.patch_tensor()
    if everywhere:
        importlib.import_module("torch._dynamo")
        pretended_gpu.patch_torch()
    else:
        rebind()
    return made
