"""A random order of 0..count-1 of which any element can be computed alone, in memory independent of the count.

A Feistel network permutes the numbers of 2h bits; numbers outside the range are permuted again until they are inside
(cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Not for cryptography.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Four rounds suffice with ideal round functions (Luby and Rackoff, 1988); these are not ideal.
ROUNDS = 8
# Odd multipliers of known mixers: 2^64 / golden ratio (splitmix64), and rrmxmx's.
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


class Shuffle:
    """A permutation of 0..count-1, a pure function of its keys.

    Args:
        count: length of the permutation.
        keys: random bits, uint64 [ROUNDS].
    """

    def __init__(self, count: int, *, keys: NDArray[np.uint64]) -> None:
        assert len(keys) == ROUNDS
        self._count = np.uint64(count)
        bits = max(1, -(-(count - 1).bit_length() // 2))  # of each half: fewer than 4 * count numbers in all
        self._half, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._keys = keys

    def at(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """The numbers at these places, int64, of the shape of `places`, whose elements are in 0..count-1."""
        return self._walk(places, self._forward)

    def place_of(self, numbers: NDArray[np.integer]) -> NDArray[np.int64]:
        """The places of these numbers: the inverse of `at`."""
        return self._walk(numbers, self._backward)

    def _walk(
        self, numbers: NDArray[np.integer], step: Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
    ) -> NDArray[np.int64]:
        """Permute until all numbers are inside the range.

        This ends, because the cycle of a number inside returns to it.
        """
        found = step(numbers.astype(np.uint64))
        outside = np.flatnonzero(found >= self._count)
        while len(outside):
            found[outside] = step(found[outside])
            outside = outside[found[outside] >= self._count]
        return found.astype(np.int64)

    def _forward(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ self._mixed(right, key)
        return (left << self._half) | right

    def _backward(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ self._mixed(left, key), left
        return (left << self._half) | right

    def _mixed(self, half: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        mixed = (half ^ key) * _FIRST  # wraps at 2^64
        mixed ^= mixed >> _SHIFT
        mixed *= _SECOND
        mixed ^= mixed >> _SHIFT
        return mixed & self._mask
