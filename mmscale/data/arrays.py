"""Reads .npy files of untrusted origin within the bounds of the file size, and hashes arrays of integers. No torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of the state of splitmix64


def read_array(path: Path, *, mapped: bool = False) -> NDArray[Any]:
    """The array in a .npy file.

    A header may claim any shape, so it is compared with the size of the file before memory is allocated. numpy's `load`
    allocates first, and also opens archives and pickles.
    """
    size = path.stat().st_size
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError("it is not a regular file")
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (TypeError, ArithmeticError, MemoryError, EOFError, SyntaxError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {str(error) or type(error).__name__}") from None
    if array.dtype.kind not in "biuf" or min(array.shape, default=0) < 0:
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not numbers")
    wanted: int = array.offset + array.nbytes  # type: ignore[attr-defined]
    if wanted != size:
        raise ValueError(f"it has {size} bytes, its header says {wanted}")
    return array if mapped else np.array(array)


def parse_array(content: bytes) -> NDArray[Any]:
    """The array in the content of a .npy file. Errors as in `read_array`."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.kind not in "biuf" or min(shape, default=0) < 0:
            raise ValueError(f"it holds {dtype} of shape {shape}, not numbers")
        return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    except (TypeError, ArithmeticError, MemoryError, EOFError, SyntaxError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {str(error) or type(error).__name__}") from None


def scattered(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of splitmix64 for each state, uint64 of the same shape: a one-to-one hash (Steele et al. 2014)."""
    return finalized(numbers + GOLDEN)


def finalized(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 without its increment: one-to-one on uint64, the same shape; 0 stays 0."""
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
