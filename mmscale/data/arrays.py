"""Arrays in .npy files that others may have written: read within the bounds of the file. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_array(path: Path, *, mapped: bool = False) -> NDArray[Any]:
    """The numbers of a .npy file.

    A header may promise any shape: it is compared with the size of the file before memory is taken. numpy's `load`
    takes the memory first, and opens archives and pickles besides.

    Args:
        path: of the file.
        mapped: leave it on disk; processes of a node share its pages.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is no .npy file of numbers, is cut off, or is longer than its header says.
    """
    size = path.stat().st_size
    if not path.is_file():  # opening a pipe would wait for its writer
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
