"""Which pictures look alike: a hash of their coarse structure finds candidates, then thumbnails are compared.

A bit of the hash says whether one of the 64 lowest frequencies of the cosine transform is strong. The usual threshold
is the median, but most frequencies are near it, and noise of 12 (of 255) then changes 12 of the 64 bits; with a fixed
threshold it changes 0.4. Pictures whose hashes differ in at most `d` bits share a key: the bits are divided into d + 2
groups, of which at least two must be equal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import PIL.Image
import scipy.fft
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.dedup.words import Hashes

_EDGE, _LOW = 32, 8  # edges of the transform, and of the part that is used
_STRONG = 64.0  # threshold for an orthonormal transform of 32 x 32 pixels; noise of 12 gives 7, all black or white 8160
GREY, COLOUR = 16, 4  # edges of the thumbnails [pixels]
# Largest differences (of 255) between thumbnails of the same picture. Lossy codes change 16 x 16 means by less than
# 20; an object that only one of the pictures has changes some of them by 100.
_MOST, _MEAN = 40, 8.0


@dataclass(frozen=True, eq=False)
class PictureHashes:
    """The compared properties of n pictures.

    Attributes:
        bits: hashes of their structure, uint64 [n].
        grey: thumbnails, uint8 [n, GREY * GREY].
        colour: mean colours of parts, uint8 [n, COLOUR * COLOUR * 3].
    """

    bits: Hashes
    grey: NDArray[np.uint8]
    colour: NDArray[np.uint8]

    def take(self, numbers: NDArray[np.int64]) -> PictureHashes:
        """The properties of the pictures with these numbers [m], in the given order."""
        return PictureHashes(self.bits[numbers], self.grey[numbers], self.colour[numbers])


PictureHash = tuple[int, NDArray[np.uint8], NDArray[np.uint8]]  # hash and thumbnails of a picture, as in PictureHashes


def joined(hashes: Sequence[PictureHash]) -> PictureHashes:
    """The properties of several pictures."""
    return PictureHashes(
        np.array([one[0] for one in hashes], np.uint64),
        np.array([one[1] for one in hashes], np.uint8).reshape(-1, GREY * GREY),
        np.array([one[2] for one in hashes], np.uint8).reshape(-1, COLOUR * COLOUR * 3),
    )


def hash_picture(pixels: NDArray[np.uint8]) -> PictureHash:
    """Hash and thumbnails of one picture, uint8 [height, width, 1 or 3]."""
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    grey = picture.convert("L")
    small = np.asarray(grey.resize((_EDGE, _EDGE), PIL.Image.Resampling.BOX), np.float64)
    low = scipy.fft.dctn(small, norm="ortho")[:_LOW, :_LOW].ravel()
    bits = int.from_bytes(np.packbits(low > _STRONG).tobytes(), "big")
    return bits, _thumbnail(grey, GREY), _thumbnail(picture.convert("RGB"), COLOUR)


def _thumbnail(picture: PIL.Image.Image, edge: int) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((edge, edge), PIL.Image.Resampling.BOX), np.uint8).ravel()


def near(one: PictureHashes, other: PictureHashes, *, distance: int) -> NDArray[np.bool_]:
    """Whether pictures look alike, pair by pair [n]."""
    bits = np.bitwise_count(one.bits ^ other.bits) <= distance
    grey = np.abs(one.grey.astype(np.int16) - other.grey)
    colour = np.abs(one.colour.astype(np.int16) - other.colour)
    return bits & (grey.max(axis=1) <= _MOST) & (grey.mean(axis=1) <= _MEAN) & (colour.max(axis=1) <= _MOST)


def table_keys(bits: Hashes, *, distance: int) -> Hashes:
    """Keys, of which hashes within a distance share at least one, uint64 [n, tables]."""
    masks, salts = _tables(distance)
    return scattered((bits[:, None] & masks) ^ salts)


@functools.cache
def _tables(distance: int) -> tuple[Hashes, Hashes]:
    """The bits that each table compares, and numbers by which the keys of tables differ, each uint64 [tables]."""
    groups = np.array_split(np.arange(64), distance + 2)
    masks = [sum(1 << int(bit) for group in pair for bit in group) for pair in combinations(groups, 2)]
    return np.array(masks, np.uint64), scattered(np.arange(len(masks), dtype=np.uint64))
