"""Lossless JSON for the counters and settings of a checkpoint: no pickle, readable in any language.

Tuples, keys other than text, bytes and tensors, which JSON lacks, are tagged. For small values: the result is one text.
"""

from __future__ import annotations

import base64
from typing import Any

import torch

from mmscale.errors import CheckpointError

_TUPLE, _DICT, _BYTES, _TENSOR = "__tuple__", "__dict__", "__bytes__", "__tensor__"
_TAGS = {_TUPLE, _DICT, _BYTES, _TENSOR}


def encode(value: Any) -> Any:
    """A JSON-compatible value that `decode` turns back into `value`.

    Raises:
        CheckpointError: a value is neither plain data nor a tensor.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key not in _TAGS for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_DICT: [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        content = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
        shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
        return {_TENSOR: {"dtype": dtype, "shape": shape, "bytes": base64.b64encode(content).decode()}}
    raise CheckpointError(
        f"the checkpoint's settings hold a {type(value).__name__}, which cannot be archived",
        remedy="archive the weights alone: --weights",
    )


def decode(value: Any) -> Any:
    """The value that was passed to `encode`.

    Raises:
        ValueError, TypeError, KeyError: the input is not from `encode`.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else None
    if tag == _TUPLE:
        return tuple(decode(item) for item in value[_TUPLE])
    if tag == _DICT:
        return {decode(key): decode(item) for key, item in value[_DICT]}
    if tag == _BYTES:
        return base64.b64decode(value[_BYTES], validate=True)
    if tag == _TENSOR:
        dtype = getattr(torch, value[_TENSOR]["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{dtype} is no type of a tensor")
        content = bytearray(base64.b64decode(value[_TENSOR]["bytes"], validate=True))
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(value[_TENSOR]["shape"])
    return {key: decode(item) for key, item in value.items()}
