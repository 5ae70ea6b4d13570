"""Image tokenizers of other packages: `data.prepare.image.kind` names a plug-in.

A data set's folder names the plug-in, so a process that encodes or decodes images imports it. Only subclasses of
`ImageCodes` are called, so that a data set from elsewhere cannot make mmscale call an arbitrary function.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.data.modalities.image_settings import SETTINGS, Fitting, write_settings
from mmscale.data.modalities.patches import Codes, Pixels
from mmscale.errors import DataError, MmscaleError
from mmscale.tables import plugins
from mmscale.tables.plugins import Use

KIND = "image_tokenizer"  # key in the table of plug-ins
OWN = "plugin"  # folder of the plug-in's own files, inside the tokenizer's folder


class ImageCodes(ABC):
    """Base class of image tokenizers in plug-ins. Errors of its methods are reported with the name of the plug-in.

    mmscale resizes pictures to squares of `size` pixels before, and maps codes to the ids of images afterwards.

    Args:
        size: edge of the images [pixels].
        channels: 1 or 3.
    """

    vocab_size: int  # codes are 0..vocab_size-1; known after `fit` or `load`
    grid: tuple[int, int]  # rows and columns of codes

    def __init__(self, size: int, channels: int) -> None:
        self.size, self.channels = size, channels

    @abstractmethod
    def fit(self, images: Iterator[Pixels], codes: int) -> None:
        """Fit it to training images; the result must not depend on anything else.

        Args:
            images: each uint8 [size, size, channels].
            codes: largest number of codes that it may have.
        """

    @abstractmethod
    def encode(self, images: Pixels) -> Codes:
        """Images uint8 [n, size, size, channels] to codes int64 [n, rows * columns]."""

    @abstractmethod
    def decode(self, codes: Codes) -> Pixels:
        """Codes int64 [n, rows * columns] to images uint8 [n, size, size, channels]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that `load` reads into an empty folder. The same tokenizer must write the same bytes."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read the files that `save` wrote."""


class PluginTokenizer:
    """An image tokenizer implemented by a plug-in (an `ImageTokenizer`).

    Args:
        use: names the plug-in, and its arguments.
        size: edge of the images [pixels].
        channels: 1 or 3.
        fitting: how pictures get this size.

    Raises:
        PluginError: the plug-in cannot be loaded, or is not a subclass of `ImageCodes`.
    """

    def __init__(self, use: Use, size: int, channels: int, fitting: Fitting) -> None:
        plugins.check(use)
        self._use, self.kind = use, use.name
        self.size, self.channels, self.fitting = size, channels, fitting
        self.made: ImageCodes = plugins.make(use, size, channels)

    def fit(self, images: Iterator[Pixels], codes: int) -> None:
        """Fit it to images.

        Raises:
            DataError: the plug-in fails, or has too many codes.
        """
        self._guarded("be fitted", lambda: self.made.fit(images, codes))
        if not 0 < self.vocab_size <= codes:
            raise DataError(
                f"image tokenizer: {self.kind} has {self.vocab_size} codes, vocab.modalities has {codes} ids of images",
                remedy="`fit` gets the largest number of codes, see docs/extending/image_tokenizer.md",
            )

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return int(self.made.vocab_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        rows, columns = self.made.grid
        return int(rows), int(columns)

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to codes int64 [n, T].

        Raises:
            DataError: the plug-in fails, or its result is not codes.
        """
        codes = np.asarray(self._guarded("encode images", lambda: self.made.encode(images_nHWC)))
        wanted = (len(images_nHWC), self.tokens_per_item)
        whole = codes.shape == wanted and codes.dtype.kind in "iu"
        if not whole or (codes.size and not 0 <= codes.min() <= codes.max() < self.vocab_size):
            raise DataError(
                f"image tokenizer: {self.kind} encodes to {codes.dtype} {list(codes.shape)}, wants whole numbers below "
                f"{self.vocab_size} of shape {list(wanted)}",
                remedy="correct `encode` of the plug-in, see docs/extending/image_tokenizer.md",
            )
        return codes.astype(np.int64)

    def decode(self, codes_nT: Codes) -> Pixels:
        """Codes int [n, T] to images uint8 [n, H, W, C].

        Raises:
            DataError: the plug-in fails, or its result is not images.
        """
        images = np.asarray(self._guarded("draw images", lambda: self.made.decode(np.asarray(codes_nT))))
        wanted = (len(codes_nT), self.size, self.size, self.channels)
        if images.shape != wanted or images.dtype != np.uint8:
            raise DataError(
                f"image tokenizer: {self.kind} draws {images.dtype} {list(images.shape)}, wants uint8 {list(wanted)}",
                remedy="correct `decode` of the plug-in, see docs/extending/image_tokenizer.md",
            )
        return images

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "size": self.size, "channels": self.channels, "args": dict(self._use.args)}
        return own | self.fitting.changed()

    def fingerprint(self) -> str:
        """Hash of the settings and of the plug-in's files."""
        import tempfile  # rarely needed

        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        with tempfile.TemporaryDirectory() as scratch:
            self._save(Path(scratch))
            for file in sorted(Path(scratch).rglob("*")):
                if file.is_file():
                    digest.update(str(file.relative_to(scratch)).encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the settings, and the plug-in's files in a separate folder."""
        write_settings(folder, self._settings())
        own = folder / OWN
        own.mkdir()
        self._save(own)

    def _save(self, folder: Path) -> None:
        self._guarded("be saved", lambda: self.made.save(folder))

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> PluginTokenizer:
        """Read what `save` wrote; `settings` are the content of its settings file.

        Raises:
            PluginError: its package is not installed here.
            DataError: it cannot be read.
        """
        name, size, channels, args = (settings[key] for key in ("kind", "size", "channels", "args"))
        if not (type(size) is type(channels) is int and isinstance(args, dict)):
            raise DataError(
                f"image tokenizer: {folder / SETTINGS} is damaged", remedy="prepare the data again, or name another set"
            )
        use = Use(KIND, f"kind in {folder / SETTINGS}", str(name), args)
        found = cls(use, size, channels, Fitting.of(settings))
        found._guarded(f"read {folder}", lambda: found.made.load(folder / OWN))
        return found

    def _guarded(self, what: str, call: Any) -> Any:
        """The result of a method of the plug-in. Any error becomes one line that names the plug-in."""
        try:
            return call()
        except (MmscaleError, OSError):
            raise
        except Exception as error:  # a plug-in may raise anything
            raise DataError(
                f"image tokenizer: {self.kind} cannot {what}: {type(error).__name__}: {error}",
                remedy="correct the plug-in, see docs/extending/image_tokenizer.md",
            ) from error
