"""Images as a modality: read by Pillow, coded by the tokenizers of image_tokens.py, written as PNG.

No torch here (a `vq` tokenizer brings its own).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmscale.config import PrepareConfig
from mmscale.data.modalities import image_kinds, image_tokens
from mmscale.data.modalities.image_files import (
    ENLARGED,
    FRAMES,
    LOST,
    OBLONG,
    PICTURES,
    TRANSPARENT,
    read_pixels,
    salvaged,
    save_png,
)
from mmscale.data.modalities.image_settings import SETTINGS, Fitting
from mmscale.data.modalities.image_tokens import ImageTokenizer
from mmscale.data.modalities.modality import Report, Sample, Tally
from mmscale.errors import ConfigError
from mmscale.tables.settings import IMAGE_FITS

_PATCHES_PER_IMAGE = 8  # one image is read for every 8 requested patches: enough variety without reading all images
_PATCHES_PER_CODE = 40  # with fewer patches per code, k-means overfits to them
_LEAST_CODES = 16


class ImageModality:
    """Pictures of one size; settings are `data.prepare.image`."""

    name: ClassVar[str] = "image"
    plural: ClassVar[str] = "pictures"
    suffixes: ClassVar[tuple[str, ...]] = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
    written: ClassVar[str] = ".png"
    files: ClassVar[tuple[str, ...]] = (SETTINGS,)  # and the files of the tokenizer's kind
    shipped: ClassVar[bool] = False  # exports contain image_codes_moma.py and pixels_moma.py instead

    @staticmethod
    def check(settings: Mapping[str, Any], prepare: PrepareConfig, codes: int) -> ImageTokenizer | None:
        """Refuse settings of `data.prepare.image` that `fit` would refuse, without images.

        Raises:
            ConfigError: they do not fit each other.
            DataError: a named folder cannot be read.
        """
        _refuse_own(settings)
        return image_kinds.check_image(prepare.image, codes)

    @staticmethod
    def fit(settings: Mapping[str, Any], items: Sample, codes: int, report: Report) -> ImageTokenizer | None:
        """The tokenizer of `data.prepare.image`, fitted to training images if it has a codebook.

        Raises:
            ConfigError: its settings do not fit each other.
            DataError: a named folder cannot be read.
        """
        _refuse_own(settings)
        return image_kinds.fit_image_tokenizer(items, codes, report)

    @staticmethod
    def load(folder: Path) -> ImageTokenizer:
        """Read a tokenizer."""
        return image_kinds.load_image_tokenizer(folder)

    @staticmethod
    def read(source: Any, codec: Any) -> NDArray[np.uint8]:
        """Pixels uint8 [H, W, C] of a file, bytes or pixels."""
        return read_pixels(source, size=codec.size, channels=codec.channels, fitting=codec.fitting)

    @staticmethod
    def read_counted(source: Any, codec: Any, tally: Tally) -> NDArray[np.uint8]:
        """The same as `read`; counts pictures that were not square, not opaque, too small, or one of several frames."""
        return read_pixels(source, size=codec.size, channels=codec.channels, fitting=codec.fitting, tally=tally)

    @staticmethod
    def salvage(source: Any) -> NDArray[np.uint8]:
        """The readable part of a damaged picture, as a source for `read`."""
        return salvaged(source)

    @staticmethod
    def remarks(tally: Mapping[str, float], codec: Any) -> list[str]:
        """Sentences about pictures that were not square, not opaque, too small or one of several frames."""
        found, count, fitting = [], int(tally.get(PICTURES, 0)), codec.fitting
        if oblong := int(tally.get(OBLONG, 0)):
            done = IMAGE_FITS[fitting.fit].done.format(share=f"{tally.get(LOST, 0) / oblong:.0%}")
            others = ", ".join(name for name in IMAGE_FITS if name != fitting.fit)
            found.append(
                f"{oblong:,} of {count:,} pictures {_were(oblong)} not square: {done} (data.prepare.image.fit: "
                f"{fitting.fit}; others: {others})"
            )
        if transparent := int(tally.get(TRANSPARENT, 0)):
            colour = "white" if fitting.background == Fitting().background else str(list(fitting.background))
            found.append(
                f"{transparent:,} of {count:,} pictures have transparent pixels: they show {colour} "
                "(data.prepare.image.background)"
            )
        if enlarged := int(tally.get(ENLARGED, 0)):
            found.append(
                f"{enlarged:,} of {count:,} pictures {_were(enlarged)} smaller than {codec.size} x {codec.size}: they "
                "are enlarged (data.prepare.image.size)"
            )
        if several := int(tally.get(FRAMES, 0)):
            found.append(
                f"{several:,} of {count:,} pictures {'has' if several == 1 else 'have'} several frames (animations or "
                "pages): only the first one is used"
            )
        return found

    @staticmethod
    def write(values: NDArray[Any], file: Path, codec: Any) -> None:
        """Write pixels as a PNG file."""
        save_png(values, file)

    @staticmethod
    def picture(values: NDArray[Any], codec: Any) -> NDArray[np.uint8]:
        """The pixels themselves."""
        return values

    @staticmethod
    def quality(codec: Any, items: NDArray[Any]) -> dict[str, Any]:
        """As `image_tokens.quality`."""
        measured = image_tokens.quality(codec, items)
        lost = "nothing is lost" if measured.get("exact") else "PSNR not measured"
        if measured["psnr_db"] is not None:
            lost = f"PSNR {measured['psnr_db']} dB"
        return measured | {"said": lost}


def _refuse_own(settings: Mapping[str, Any]) -> None:
    if settings:
        raise ConfigError(
            f"data.prepare.modalities.image has {', '.join(settings)}", remedy="use data.prepare.image instead"
        )


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
