"""Counts where code reads tensors on the host, which on a GPU would make the host wait for the device.

Two modes are needed, because neither sees everything: `.item()`, `bool(tensor)` and boolean masks reach the dispatcher,
`.tolist()`, `.cpu()` and `.numpy()` of a host tensor do not. Also counted are uploads of Python numbers, which on CUDA
copy from pageable memory and wait, and `runtime.device.synchronize`, which does nothing on a host.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.runtime import device

_aten = torch.ops.aten
# Operators whose result, or the size of whose result, is needed on the host.
_READS = {
    _aten._local_scalar_dense,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
# Operators that count the ones of boolean masks among their indices; writing a single number becomes masked_fill_.
_GATHERS = {_aten.index}
_WRITES = {_aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.new_tensor: "upload",
    torch.tensor: "upload",
    torch.as_tensor: "upload",
}
_FACTORIES = {torch.tensor, torch.as_tensor}
_ROOMS = ("mmscale.", "megatron.", "transformer_engine.", "tests.", "test_", "checks_")
_KERNELS = "tests.te_on_cpu."  # plain torch instead of kernels, whose reads a kernel would not make


class DeviceReads:
    """Counts reads in a `with` block, by (place, what); a place is `module:function` of mmscale's innermost frame."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._modes = (_Functions(self._note), _Operators(self._note))

    def _note(self, what: str) -> None:
        for frame in _frames():
            name = str(frame.f_globals.get("__name__", ""))
            if name.startswith(_KERNELS):
                return
            if name.startswith(_ROOMS) and name != __name__:
                self.found[f"{name}:{frame.f_code.co_name}", what] += 1
                return
        self.found["elsewhere", what] += 1

    def __enter__(self) -> DeviceReads:
        self._synchronize = device.synchronize
        device.synchronize = lambda: self._note("synchronize")
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        device.synchronize = self._synchronize


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Functions(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        what = _FUNCTIONS.get(func, "")
        # Without a `device` argument torch.tensor makes a host tensor, as in megatron-core's schedules; as_tensor of a
        # tensor (schedules.py of 0.19, _normalize_loss_scale) copies nothing if it is on the device already.
        made = func in _FACTORIES and ((kwargs or {}).get("device") is None or isinstance(args[0], torch.Tensor))
        if what and not made:
            self.note(what)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        counts = packet in _GATHERS or (packet in _WRITES and args[2].numel() != 1)
        if packet in _READS or (counts and any(_is_mask(index) for index in args[1])):
            self.note(str(packet).removeprefix("aten."))
        if packet is _aten.repeat_interleave and not (kwargs or {}).get("output_size"):
            self.note("repeat_interleave")
        return func(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
