"""A `torch` that reports a GPU: to Transformer-Engine's modules only, or to all modules.

Factories create "cuda" tensors on the host, streams and events complete immediately, memory figures are zero. Code that
measures or captures (profiler, CUDA graphs) is not supported.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.enumerations import MACHINE

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "ones", "ones_like",
    "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like", "linspace",
)  # fmt: skip


def _is_gpu(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_host(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


class _Queue:
    """A stream or an event. Work completes immediately, so there is never anything to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream, self.device, self.at = 0, torch.device("cuda", 0), 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Any) -> float:
        return 1000.0 * (other.at - self.at)

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or _Queue()
        event.record()
        return event

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _properties(*_: Any) -> types.SimpleNamespace:
    major, minor = MACHINE.capability
    return types.SimpleNamespace(
        name="none: pretended",
        major=major,
        minor=minor,
        multi_processor_count=132,
        total_memory=80 * 2**30,
        uuid="0",
        L2_cache_size=50 * 2**20,
    )


def _gpu() -> dict[str, Any]:
    """The attributes of `torch.cuda` that are replaced."""

    def nothing(*_: Any, **__: Any) -> None: ...

    def zero(*_: Any, **__: Any) -> int:
        return 0

    stream = _Queue()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": nothing,
        "synchronize": nothing,
        "set_sync_debug_mode": nothing,
        "empty_cache": nothing,
        "get_device_name": lambda *_: _properties().name,
        "get_device_properties": _properties,
        "get_device_capability": lambda *_: MACHINE.capability,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": nothing,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "Stream": _Queue,
        "Event": _Queue,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": nothing,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda new_state, *_, **__: torch.set_rng_state(new_state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "default_generators": (torch.default_generator,),
        "_lazy_call": lambda function, **_: function(),
        "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
        "ipc_collect": nothing,
        "nvtx": types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=lambda *_: contextlib.nullcontext()),
    }


class _Cuda(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.__dict__.update(_gpu())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_coalescing_manager_of = torch.distributed.distributed_c10d._coalescing_manager


def _coalescing_manager(group: Any = None, device: Any = None, async_ops: bool | None = False) -> Any:
    """gloo cannot start a group of messages; without a device torch combines them itself."""
    del device
    return _coalescing_manager_of(group, None, async_ops)


class _Work:
    """A message that may be waited for twice, as with NCCL: gloo would wait for another one."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None


def _isend(tensor: Tensor, peer: int, group: Any) -> _Work:
    return _Work(torch.distributed.isend(tensor, peer, group))


def _irecv(tensor: Tensor, peer: int, group: Any) -> _Work:
    return _Work(torch.distributed.irecv(tensor, peer, group))


class _Distributed(types.ModuleType):
    _coalescing_manager = staticmethod(_coalescing_manager)
    isend, irecv = staticmethod(_isend), staticmethod(_irecv)

    @staticmethod
    def P2POp(function: Any, tensor: Tensor, peer: int, group: Any) -> Any:
        plain = {_isend: torch.distributed.isend, _irecv: torch.distributed.irecv}
        return torch.distributed.P2POp(plain[function], tensor, peer, group)

    @staticmethod
    def batch_isend_irecv(messages: list[Any]) -> list[_Work]:
        return [_Work(work) for work in torch.distributed.batch_isend_irecv(messages)]

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)


class _Torch(types.ModuleType):
    """The `torch` for Transformer-Engine's modules."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__.update(vars(torch))
        self.__dict__["cuda"] = _Cuda()
        self.__dict__["distributed"] = _Distributed("torch.distributed")
        self.__dict__["version"] = types.SimpleNamespace(**{**vars(torch.version), "cuda": MACHINE.cuda})
        for name in _FACTORIES:
            self.__dict__[name] = _on_host(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _asks(depth: int = 2) -> bool:
    """Whether the caller is Transformer-Engine's Python, directly or through mmscale's CPU adaptor."""
    name = sys._getframe(depth).f_globals.get("__name__", "")
    if name.startswith("mmscale.runtime.megatron_"):
        name = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return name == "transformer_engine" or name.startswith("transformer_engine.")


_cuda_of, _to_of, _is_cuda_of = torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.is_cuda
_everywhere = False  # set by `patch_torch`


def patch_tensor() -> None:
    def is_cuda(self: Tensor) -> bool:
        return True if _everywhere or _asks() else _is_cuda_of.__get__(self)

    def cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if _everywhere or _asks() else _cuda_of(self, *args, **kwargs)

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _everywhere or _asks():
            args = tuple(_CPU if isinstance(a, (str, torch.device)) and _is_gpu(a) else a for a in args)
            if args and isinstance(args[0], int) and not isinstance(args[0], bool):
                args = (_CPU, *args[1:])
            if _is_gpu(kwargs.get("device")):
                kwargs["device"] = _CPU
        return _to_of(self, *args, **kwargs)

    wrapper = torch.Tensor._make_wrapper_subclass
    torch.Tensor._make_wrapper_subclass = staticmethod(_on_host(wrapper))  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(is_cuda)  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = cuda  # type: ignore[assignment, method-assign]
    torch.Tensor.to = to  # type: ignore[assignment, method-assign]


def patch_torch() -> None:
    """Change torch itself, for all modules."""
    global _everywhere
    _everywhere = True
    for name, value in _gpu().items():
        setattr(torch.cuda, name, value)
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    torch.version.cuda = MACHINE.cuda
    torch.distributed._coalescing_manager = _coalescing_manager
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment, misc]
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    module_to = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_CPU if isinstance(a, (str, torch.device, int)) and _is_gpu(a) else a for a in args)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = _CPU
        return module_to(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[assignment, method-assign]
    type_of = torch.Tensor.type

    def kind(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = kind  # type: ignore[assignment, method-assign]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment, method-assign]
    torch.Tensor.record_stream = lambda self, *_: None  # type: ignore[assignment, method-assign]


@functools.cache
def proxy() -> _Torch:
    """The `torch` for Transformer-Engine's modules."""
    return _Torch()
