"""Codes of square patches by their mean brightness, as levels that the training images use equally often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.extend import ImageCodes


class PatchMeans(ImageCodes):
    """The tokenizer.

    Args:
        size, channels: of the images; given by mmscale.
        patch: edge of a patch [pixels].
    """

    def __init__(self, size: int, channels: int, *, patch: int = 4) -> None:
        super().__init__(size, channels)
        if size % patch:
            raise ValueError(f"patches of {patch} pixels do not tile images of {size} pixels")
        self.patch, self.grid = patch, (size // patch, size // patch)

    def fit(self, images: Iterator[Any], codes: int) -> None:
        """Levels are quantiles of the patches' means."""
        means = np.concatenate([self._means(image[None]).ravel() for image in itertools.islice(images, 10_000)])
        self._use(np.unique(np.quantile(means, (np.arange(codes) + 0.5) / codes)))

    def encode(self, images: Any) -> Any:
        """The nearest level of each patch."""
        means = self._means(images).reshape(len(images), -1, 1)
        return np.abs(means - self.levels).argmin(axis=-1)

    def decode(self, codes: Any) -> Any:
        """Grey patches."""
        grey = np.rint(self.levels[codes]).astype(np.uint8).reshape(-1, *self.grid)
        whole = grey.repeat(self.patch, axis=1).repeat(self.patch, axis=2)
        return whole[..., None].repeat(self.channels, axis=-1)

    def save(self, folder: Path) -> None:
        """Write the levels."""
        np.save(folder / "levels.npy", self.levels)

    def load(self, folder: Path) -> None:
        """Read the levels."""
        self._use(np.load(folder / "levels.npy", allow_pickle=False))

    def _use(self, levels: Any) -> None:
        self.levels, self.vocab_size = levels, len(levels)

    def _means(self, images: Any) -> Any:
        rows, columns = self.grid
        return images.reshape(len(images), rows, self.patch, columns, self.patch, -1).mean(axis=(2, 4, 5))
