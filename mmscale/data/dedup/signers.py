"""Programs that compute MinHash signatures, by the name that a user gives them. Signatures of two programs differ."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.words import MINIMA, Hashes, signature
from mmscale.errors import DataError, UsageError

Signer = Callable[[Hashes], NDArray[np.uint32]]
NUMPY, RENSA = "numpy", "rensa"
_SEED = 2153


def exact_name(name: str) -> str:
    """The name with the version of the algorithm, which tasks on other machines must have as well.

    Args:
        name: a key of `MINHASHES`.

    Raises:
        UsageError: the package is not installed.
    """
    if name != RENSA:
        return name
    try:
        return f"{RENSA} {_rensa().ALGORITHM_VERSION}"
    except ModuleNotFoundError as error:
        raise UsageError(
            "--minhash rensa: rensa is not installed", remedy="pip install 'mmscale[rensa]', or leave --minhash out"
        ) from error


def signer(name: str) -> Signer:
    """The function that computes a signature, uint32 [MINIMA], from the distinct shingles of a text.

    Args:
        name: from `exact_name`.

    Raises:
        DataError: this machine has another version of the program.
        UsageError: the package is not installed.
    """
    if name == NUMPY:
        return signature
    here = exact_name(RENSA)
    if here != name:
        raise DataError(
            f"data dedup: signatures are made by {name}, and this machine has {here}",
            remedy="install the same version of rensa on all machines",
        )
    make = _rensa().digest_matrix_from_flat_token_hashes

    def sign(found: Hashes) -> NDArray[np.uint32]:
        ends = np.array([0, len(found)], np.uint64)
        return np.array(make(np.ascontiguousarray(found), ends, MINIMA, _SEED).to_rows()[0], np.uint32)

    return sign


def _rensa() -> Any:
    return importlib.import_module("rensa").RMinHash
