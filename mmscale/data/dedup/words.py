"""Words, shingles and MinHash signatures of texts: numbers only, no files.

The share of equal minima of two signatures estimates the Jaccard index of their texts' shingles (Broder 1997). With
`BANDS` bands of `ROWS` minima, a pair of Jaccard index j has an equal band with probability 1 - (1 - j^ROWS)^BANDS:
0.13 at 0.5, 0.79 at 0.7, 0.985 at 0.8, 0.9999 at 0.9.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmscale.data.arrays import scattered

MINIMA = 128  # numbers of a signature; the standard error of an estimate of 0.8 is 0.035
BANDS, ROWS = 18, 7  # 126 of the minima; the last two are used for the estimate only
SHINGLE = 5  # words
_CHUNK = 256  # shingles that are hashed together: 256 kB of numbers, which fit into a cache
_CACHED = 1 << 18  # words whose hashes are kept
# Each letter of a script without spaces is a word. So is each punctuation mark: ":-)" and ":-(" differ.
_SOLID = "぀-ヿ㐀-鿿가-힯"
_WORD = re.compile(rf"[{_SOLID}]|[^\W{_SOLID}]+|[^\w\s]")

_random = np.random.Generator(np.random.Philox(key=[2153, 0])).integers
_FACTORS = _random(1, 1 << 63, MINIMA, dtype=np.uint64) | np.uint64(1)
_SUMMANDS = _random(0, 1 << 63, MINIMA, dtype=np.uint64)
_HALF = np.uint64(32)

Hashes = NDArray[np.uint64]
_cache: dict[str, int] = {}


def words_of(text: str) -> list[str]:
    """Words of a text, ignoring case and spaces."""
    return _WORD.findall(text.casefold())


def hashes_of(words: Sequence[str]) -> Hashes:
    """A hash of each word, uint64 [n]."""
    if len(_cache) > _CACHED:
        _cache.clear()
    for word in words:
        if word not in _cache:
            _cache[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
    return np.fromiter((_cache[word] for word in words), np.uint64, len(words))


def shingles(words: Hashes, size: int) -> Hashes:
    """Hashes of all runs of `size` words, uint64; if there are fewer words, of the only run.

    Args:
        words: hashes of the words of a text, in its order [n].
        size: words of a shingle.
    """
    size = min(size, len(words))
    count = len(words) - size + 1 if size else 0
    found = np.zeros(count, np.uint64)
    for place in range(size):
        found = scattered(found ^ words[place : place + count])
    return found


def signature(found: Hashes) -> NDArray[np.uint32]:
    """The MinHash signature of a set of shingles, uint32 [MINIMA]; of an empty set all bits are set."""
    least = np.full(MINIMA, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(found), _CHUNK):
        some = found[start : start + _CHUNK, None] * _FACTORS + _SUMMANDS
        np.minimum(least, some.min(axis=0), out=least)
    return (least >> _HALF).astype(np.uint32)


def band_keys(signatures: NDArray[np.uint32]) -> Hashes:
    """One key for each band of each signature, uint64 [n, BANDS]."""
    rows = signatures[:, : BANDS * ROWS].reshape(-1, BANDS, ROWS).astype(np.uint64)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), rows.shape[:2])
    for row in range(ROWS):
        keys = scattered(keys ^ rows[..., row])
    return keys
