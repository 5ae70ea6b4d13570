"""Images to discrete codes and back behind one small interface: grey levels, and one or two codebooks of patches.

Arithmetic on patches is patches.py; the neural tokenizer is image_vq.py; loading and resizing pictures is
image_files.py. Codes start at 0: the encoder handles the id range. No torch here.

Letters: n images, H W C height, width, channels, T tokens of an image, K codes, R codes of residuals, D numbers of a
patch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.modalities.image_settings import Fitting, write_settings
from mmscale.data.modalities.patches import Book, Codes, Pixels, cluster, codebook, from_patches, silent, to_patches
from mmscale.errors import DataError

FOLDER = "image_tokenizer"
_CODEBOOK = "codebook.npy"
_RESIDUAL = "residual.npy"
DEFAULT = Fitting()


class ImageTokenizer(Protocol):
    """Interface of image tokenizers."""

    kind: str
    size: int  # edge of its images [pixels]
    channels: int  # 1 or 3
    fitting: Fitting  # how pictures get this size

    @property
    def vocab_size(self) -> int:
        """Codes are 0..vocab_size-1."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""

    @property
    def tokens_per_item(self) -> int:
        """T, equal for every image [tokens]."""

    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to codes int64 [n, T]."""

    def decode(self, codes_nT: Codes) -> Pixels:
        """Codes int [n, T] to images uint8 [n, H, W, C].

        Raises:
            DataError: this tokenizer cannot draw.
        """

    def fingerprint(self) -> str:
        """Hash of everything that affects the codes of an image."""

    def save(self, folder: Path) -> None:
        """Write it into a folder that `load_image_tokenizer` reads."""


class LevelsTokenizer:
    """Every pixel's brightness, rounded to one of `levels`, is a token; exact for images with so many levels.

    Args:
        size: edge of the images [pixels].
        channels: 1 or 3; the channels of a pixel are neighbours in the sequence.
        levels: number of codes, 2..256. 17 represent scikit-learn's digits exactly.
        fitting: how pictures get this size.
    """

    kind = "levels"

    def __init__(self, size: int, channels: int, levels: int, fitting: Fitting = DEFAULT) -> None:
        if not 2 <= levels <= 256:
            raise DataError(
                f"image tokenizer: levels needs 2..256 codes, not {levels}", remedy="correct vocab.modalities"
            )
        self.size, self.channels, self.vocab_size, self.fitting = size, channels, levels, fitting

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.size, self.size * self.channels

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an image."""
        return self.size * self.size * self.channels

    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to levels int64 [n, H*W*C]."""
        levels = np.rint(images_nHWC.astype(np.float64) * ((self.vocab_size - 1) / 255))
        return levels.astype(np.int64).reshape(len(images_nHWC), -1)

    def decode(self, codes_nT: Codes) -> Pixels:
        """Levels int [n, T] to images uint8 [n, H, W, C]."""
        pixels: Pixels = np.rint(np.asarray(codes_nT) * (255 / (self.vocab_size - 1))).astype(np.uint8)
        return pixels.reshape(len(pixels), self.size, self.size, self.channels)

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "size": self.size, "channels": self.channels, "levels": self.vocab_size}
        return own | self.fitting.changed()

    def fingerprint(self) -> str:
        """Hash of the settings."""
        return _hash(json.dumps(self._settings()).encode())

    def save(self, folder: Path) -> None:
        """Write the settings."""
        write_settings(folder, self._settings())

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> LevelsTokenizer:
        """Read what `save` wrote; `settings` are the content of its settings file."""
        del folder
        return cls(settings["size"], settings["channels"], settings["levels"], Fitting.of(settings))


class KMeansTokenizer:
    """The token of a patch is the nearest entry of a codebook.

    Entries are integer grey values, so distances are exact in float32 and codes do not depend on the machine, its BLAS
    or the number of threads.

    Args:
        size: edge of the images [pixels].
        channels: 1 or 3.
        patch: edge of a patch [pixels]; divides `size`.
        codebook_KD: uint8 [K, patch*patch*channels].
        fitting: how pictures get this size.
    """

    kind = "kmeans"

    def __init__(self, size: int, channels: int, patch: int, codebook_KD: Pixels, fitting: Fitting = DEFAULT) -> None:
        if size % patch:
            raise DataError(
                f"image tokenizer: patches of {patch} pixels do not tile images of {size} pixels",
                remedy="choose data.prepare.image.patch so that it divides size",
            )
        assert codebook_KD.dtype == np.uint8 and codebook_KD.shape[1] == patch * patch * channels
        self.size, self.channels, self.patch, self.codebook_KD = size, channels, patch, codebook_KD
        self.fitting = fitting
        self.book = Book(codebook_KD)

    @classmethod
    def fit(
        cls,
        patches_ND: Pixels,
        *,
        size: int,
        channels: int,
        patch: int,
        codes: int,
        fitting: Fitting = DEFAULT,
        on_progress: Callable[[str], None] = silent,
    ) -> KMeansTokenizer:
        """Fit a codebook with scikit-learn's MiniBatchKMeans; deterministic for the same patches.

        Args:
            patches_ND: uint8 [N, patch*patch*channels], at least one.
            size: edge of the images [pixels].
            channels: 1 or 3.
            patch: edge of a patch [pixels].
            codes: entries of the codebook at most; if there are no more distinct patches, they are the codebook.
            fitting: how pictures get this size.
            on_progress: receives the progress of k-means.
        """
        return cls(size, channels, patch, codebook(patches_ND, codes, on_progress=on_progress), fitting)

    @property
    def vocab_size(self) -> int:
        """Entries of the codebook."""
        return len(self.codebook_KD)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size // self.patch, self.size // self.patch

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to codes int64 [n, T]; of two equal distances the lower code wins."""
        codes = self.book.nearest(to_patches(images_nHWC, self.patch))
        return codes.reshape(len(images_nHWC), self.tokens_per_item)

    def decode(self, codes_nT: Codes) -> Pixels:
        """Codes int [n, T] to images uint8 [n, H, W, C]."""
        return from_patches(self.codebook_KD[np.asarray(codes_nT)], self.patch, grid=self.grid)

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "size": self.size, "channels": self.channels, "patch": self.patch}
        return own | self.fitting.changed()

    def fingerprint(self) -> str:
        """Hash of the settings and the codebook."""
        return _hash(json.dumps(self._settings()).encode() + self.codebook_KD.tobytes())

    def save(self, folder: Path) -> None:
        """Write the settings and the codebook."""
        write_settings(folder, self._settings())
        _write_array(folder / _CODEBOOK, self.codebook_KD)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> KMeansTokenizer:
        """Read what `save` wrote; `settings` are the content of its settings file."""
        book = read_array(folder / _CODEBOOK)
        return cls(settings["size"], settings["channels"], settings["patch"], book, Fitting.of(settings))


class ResidualTokenizer:
    """Every patch is the sum of an entry of a codebook and an entry of a second codebook for the residual.

    A patch has two consecutive tokens, so an image has twice as many as with one codebook. Codes of the first book are
    0..K-1, those of the second K..K+R-1. All entries are integers, so that codes do not depend on the machine.

    Args:
        base: the first codebook.
        residual_RD: int16 [R, patch*patch*channels], each -255..255.
    """

    kind = "kmeans-residual"

    def __init__(self, base: KMeansTokenizer, residual_RD: NDArray[np.int16]) -> None:
        assert residual_RD.dtype == np.int16 and residual_RD.shape[1] == base.codebook_KD.shape[1]
        self.base, self.residual_RD = base, residual_RD
        self.size, self.channels, self.patch, self.fitting = base.size, base.channels, base.patch, base.fitting
        self._entries = np.concatenate([base.codebook_KD.astype(np.int16), residual_RD])
        self._book = Book(residual_RD)

    @classmethod
    def fit(
        cls, patches_ND: Pixels, *, base: KMeansTokenizer, codes: int, on_progress: Callable[[str], None] = silent
    ) -> ResidualTokenizer:
        """Fit the second codebook to the residuals of the first one.

        Args:
            patches_ND: uint8 [N, patch*patch*channels], at least one.
            base: the first codebook.
            codes: entries of the second codebook at most.
            on_progress: receives the progress of k-means.
        """
        left_ND = patches_ND.astype(np.int16) - base.codebook_KD[base.book.nearest(patches_ND)]
        distinct, counts = np.unique(left_ND, axis=0, return_counts=True)
        if len(distinct) > codes:
            distinct = np.unique(
                np.rint(cluster(distinct, counts, codes, on_progress=on_progress)).clip(-255, 255).astype(np.int16),
                axis=0,
            )
        # From small to large residuals.
        order = np.argsort(np.abs(distinct.astype(np.int64)).sum(axis=1), kind="stable")
        return cls(base, np.ascontiguousarray(distinct[order]))

    @property
    def vocab_size(self) -> int:
        """Entries of both codebooks."""
        return len(self._entries)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes; the two codes of a patch are neighbours."""
        rows, columns = self.base.grid
        return rows, 2 * columns

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an image."""
        return 2 * self.base.tokens_per_item

    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to codes int64 [n, T]."""
        patches_ND = to_patches(images_nHWC, self.patch)
        first_N = self.base.book.nearest(patches_ND)
        left_ND = patches_ND.astype(np.int16) - self.base.codebook_KD[first_N]
        second_N = self._book.nearest(left_ND) + self.base.vocab_size
        return np.stack([first_N, second_N], axis=1).reshape(len(images_nHWC), self.tokens_per_item)

    def decode(self, codes_nT: Codes) -> Pixels:
        """Codes int [n, T] to images uint8 [n, H, W, C].

        Two codes of the same book, which a barely trained model may generate, are also added.
        """
        codes = np.asarray(codes_nT)
        n, (rows, columns) = len(codes), self.base.grid
        sums = self._entries[codes].reshape(n, rows * columns, 2, -1).sum(axis=2, dtype=np.int64)
        return from_patches(np.clip(sums, 0, 255).astype(np.uint8), self.patch, grid=self.base.grid)

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "size": self.size, "channels": self.channels, "patch": self.patch}
        return own | self.fitting.changed()

    def fingerprint(self) -> str:
        """Hash of the settings and both codebooks."""
        books = self.base.codebook_KD.tobytes() + self.residual_RD.tobytes()
        sizes = [self.base.vocab_size, len(self.residual_RD)]
        return _hash(json.dumps([self._settings(), sizes]).encode() + books)

    def save(self, folder: Path) -> None:
        """Write the settings and the codebooks."""
        write_settings(folder, self._settings())
        _write_array(folder / _CODEBOOK, self.base.codebook_KD)
        _write_array(folder / _RESIDUAL, self.residual_RD)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> ResidualTokenizer:
        """Read what `save` wrote; `settings` are the content of its settings file."""
        return cls(KMeansTokenizer.load(folder, settings), read_array(folder / _RESIDUAL))


def _write_array(file: Path, array: NDArray[Any]) -> None:
    # not np.save(path): its ndarray.tofile reports a full disk without an errno
    content = io.BytesIO()
    np.save(content, array)
    file.write_bytes(content.getvalue())


def quality(tokenizer: ImageTokenizer, images_nHWC: Pixels) -> dict[str, Any]:
    """How well images are reconstructed: peak signal-to-noise ratio [dB] and the number of codes in use.

    `psnr_db` is null if the tokenizer cannot decode, and if the reconstruction is exact (`exact`: the ratio is
    infinite).
    """
    codes = tokenizer.encode(images_nHWC)
    found: dict[str, Any] = {"images": len(images_nHWC), "codes_used": len(np.unique(codes)), "psnr_db": None}
    try:
        drawn = tokenizer.decode(codes)
    except DataError as error:
        return found | {"note": error.cause}
    error_squared = float(np.mean((drawn.astype(np.float64) - images_nHWC) ** 2))
    if error_squared == 0:
        return found | {"exact": True}
    return found | {"exact": False, "psnr_db": round(float(10 * np.log10(255**2 / error_squared)), 3)}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
