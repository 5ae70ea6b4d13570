"""Converts pictures of any format and size to the pixels that an image tokenizer needs, exactly as in training.

Shipped next to the weights. image_codes_moma.py converts pixels to codes.
"""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

_CHANNELS = (1, 3, 4)
# Larger pictures may be decompression bombs: a PNG of a few kB can unpack to gigabytes. Bounds as for training data.
MAX_PIXELS = 100_000_000
MAX_NUMBERS = 25_000_000  # bound for 32-bit pixels
MAX_ASPECT = 1000  # one side to the other
_RESIZED_ASPECT = 8  # the ends of longer pictures are cut off before they are resized
# Formats that Pillow decodes itself. For EPS it would run Ghostscript, whatever the file's name is.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_STRIP = 1 << 22  # pixels converted at a time; transparency needs three copies of them
_ORIENTATION = 0x0112  # tag of EXIF
Colour = tuple[int, int, int]  # red, green, blue, 0..255


def load_pixels(
    image: Any, *, size: int, channels: int, fit: str = "crop", background: Colour = (255, 255, 255)
) -> np.ndarray:
    """Pixels of one image, uint8 [size, size, channels], as in the training data.

    Args:
        image: a path, bytes, an open file, a Pillow image, an array or tensor as for `_picture` and `_bytes`, or a
            dictionary with "bytes" or "path".
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB).
        fit: conversion of a picture that is not square: "crop", "pad" or "stretch".
        background: colour under transparent pixels and of padding.

    Raises:
        ValueError: it cannot be read.
    """
    name = str(image)[:200] if isinstance(image, str | Path) else f"of type {type(image).__name__}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = _open(image)
            _check_bounds(*opened.size, numbers=opened.mode in ("I", "F"))
            picture = _convert(_upright(opened), channels, background)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        raise ValueError(f"image {name} cannot be read: {error or type(error).__name__}") from error
    if picture.size != (size, size):
        picture = FITS[fit](picture, size, background)
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def _open(image: Any) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, dict):  # as Hugging Face's datasets store images
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str) and "://" in image:
        raise ValueError("addresses are not fetched; download it and give its path")
    if isinstance(image, bytes | bytearray | memoryview):
        return PIL.Image.open(io.BytesIO(image), formats=formats())
    if isinstance(image, str | Path) or hasattr(image, "read"):
        return PIL.Image.open(image, formats=formats())
    if torch.is_tensor(image):
        _check_array(image.shape, image.element_size())  # a view may be larger than the memory behind it
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        return _picture(image, channels_first=True)
    if hasattr(image, "__array__"):
        array = np.asarray(image)
        _check_array(array.shape, array.itemsize)
        return _picture(array, channels_first=False)
    raise ValueError("give a Pillow image, a path, bytes, an array or a tensor")


def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _check_bounds(width: int, height: int, *, numbers: bool) -> None:
    """Refuse a picture by its size, before it is decoded.

    Raises:
        ValueError: it has too many pixels, or is too long for its width.
    """
    if width * height > (MAX_NUMBERS if numbers else MAX_PIXELS):
        raise ValueError(f"it has {width}x{height} pixels, too many")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width}x{height} pixels, one side is more than {MAX_ASPECT} times the other")


def _check_array(shape: tuple, item_bytes: int) -> None:
    """Refuse an array that has more values than the largest picture.

    Raises:
        ValueError: it has too many values.
    """
    if math.prod(shape) > max(_CHANNELS) * (MAX_PIXELS if item_bytes <= 2 else MAX_NUMBERS):
        raise ValueError(f"an array of shape {tuple(shape)} has too many values for one image")


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture with EXIF's orientation applied. Pillow would copy even a picture that is upright already."""
    return PIL.ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture


def _picture(array: np.ndarray, *, channels_first: bool) -> PIL.Image.Image:
    """An array as a picture.

    Args:
        array: [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.
        channels_first: which of the last two it is if both are possible: true for tensors, false for arrays.

    Raises:
        ValueError: its shape, type or values are not those of an image.
    """
    if array.ndim == 3:
        first, last = array.shape[0] in _CHANNELS, array.shape[-1] in _CHANNELS
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"no dimension of {array.shape} can be channels (1, 3 or 4)")
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"an array of shape {array.shape} is no image: give [H, W], [H, W, C] or [C, H, W], one by one"
        )
    return PIL.Image.fromarray(np.ascontiguousarray(_bytes(array)))


def _bytes(array: np.ndarray) -> np.ndarray:
    """Brightness in 0..255 from bool, 8 bits in any integer type, 16 bits in uint16, floats in 0..1 or 0..255.

    Raises:
        ValueError: values are outside of that, or not numbers.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of {array.dtype} is no image")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())  # false for NaN
    if not (whole and low >= 0 and high <= 255):
        raise ValueError(
            f"its values are {low:g} to {high:g}: give whole numbers from 0 to 255, or fractions from 0 to 1 "
            "(before any normalisation)"
        )
    return array.astype(np.uint8)


def _cropped(picture: PIL.Image.Image, size: int, background: Colour) -> PIL.Image.Image:
    """The short side resized to `size`, the centre cropped."""
    picture = _without_ends(picture)
    scale = size / min(picture.size)
    width, height = (max(size, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _padded(picture: PIL.Image.Image, size: int, background: Colour) -> PIL.Image.Image:
    """The long side resized to `size`, the picture centred on the background."""
    scale = size / max(picture.size)
    width, height = (min(size, max(1, round(edge * scale))) for edge in picture.size)
    whole = PIL.Image.new("RGB", (size, size), background).convert(picture.mode)
    whole.paste(
        picture.resize((width, height), PIL.Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2)
    )
    return whole


def _stretched(picture: PIL.Image.Image, size: int, background: Colour) -> PIL.Image.Image:
    """Both sides resized to `size`."""
    return picture.resize((size, size), PIL.Image.Resampling.LANCZOS)


FITS = {"crop": _cropped, "pad": _padded, "stretch": _stretched}


def _without_ends(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The middle of a picture whose long side is more than _RESIZED_ASPECT times its short side."""
    width, height = picture.size
    most = _RESIZED_ASPECT * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def _convert(picture: PIL.Image.Image, channels: int, background: Colour) -> PIL.Image.Image:
    """Grey or RGB on the background; works strip by strip, so that large pictures need less memory."""
    picture = _as_bytes(picture)
    width, height = picture.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return _opaque(picture, channels, background)
    whole = PIL.Image.new("L" if channels == 1 else "RGB", picture.size)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(height, top + rows)))
        whole.paste(_opaque(strip, channels, background), (0, top))
    return whole


def _as_bytes(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a picture of 16- or 32-bit pixels to bytes by scaling; Pillow's `convert` would clip at 255.

    16-bit values are shifted. Files of 32-bit pixels do not say which value is white: see `_bytes`.

    Raises:
        ValueError: the values cannot be interpreted as brightness.
    """
    sixteen = picture.mode.startswith("I;16")
    if not sixteen and picture.mode not in ("I", "F"):
        return picture
    values = np.asarray(picture)
    if sixteen or (picture.mode == "I" and picture.format in ("PNG", "PPM")):  # Pillow scales these to 0..65535
        return PIL.Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    return PIL.Image.fromarray(_bytes(values))


def _opaque(picture: PIL.Image.Image, channels: int, background: Colour) -> PIL.Image.Image:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        under = PIL.Image.new("RGBA", picture.size, (*background, 255))
        picture = PIL.Image.alpha_composite(under, picture)
    return picture.convert("L" if channels == 1 else "RGB")


__all__ = ["FITS", "FORMATS", "MAX_ASPECT", "MAX_NUMBERS", "MAX_PIXELS", "formats", "load_pixels"]
