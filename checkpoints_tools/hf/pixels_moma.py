"""Pictures of any format and size as the pixels that an image tokenizer takes, exactly as in training.

Shipped beside the weights. Codes are the business of image_codes_moma.py.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

_CHANNELS = (1, 3, 4)
MAX_PIXELS = 100_000_000  # larger pictures may be bombs: a PNG of a few kB can unpack to gigabytes


def load_pixels(image: Any, *, size: int, channels: int) -> np.ndarray:
    """Pixels of one image, uint8 [size, size, channels], as the training data had them.

    Args:
        image: a path, bytes, an open file, a Pillow image, an array or tensor as `_picture` and `_bytes` say, or a
            dictionary with "bytes" or "path".
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.

    Raises:
        ValueError: it cannot be read.
    """
    name = str(image)[:200] if isinstance(image, str | Path) else f"of type {type(image).__name__}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = _open(image)
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, too many")
            picture = _convert(PIL.ImageOps.exif_transpose(opened), channels)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        raise ValueError(f"image {name} cannot be read: {error}") from error
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(edge * scale)) for edge in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def _open(image: Any) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, dict):  # as Hugging Face's datasets store images
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str) and "://" in image:
        raise ValueError("addresses are not fetched; download it and give its path")
    if isinstance(image, bytes | bytearray | memoryview):
        return PIL.Image.open(io.BytesIO(image))
    if isinstance(image, str | Path) or hasattr(image, "read"):
        return PIL.Image.open(image)
    if torch.is_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        return _picture(image, channels_first=True)
    if hasattr(image, "__array__"):
        return _picture(np.asarray(image), channels_first=False)
    raise ValueError("give a Pillow image, a path, bytes, an array or a tensor")


def _picture(array: np.ndarray, *, channels_first: bool) -> PIL.Image.Image:
    """An array as a picture.

    Args:
        array: [H, W], [H, W, C] or [C, H, W] of 1, 3 or 4 channels.
        channels_first: which of the last two it is if both can be: true for tensors, false for arrays.

    Raises:
        ValueError: its shape, type or values are no image's.
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
    """Brightness in 0..255: of bool, of 8 bits in any whole type, of 16 bits in uint16, of floats in 0..1 or 0..255.

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
    whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())  # a NaN equals nothing
    if not (whole and low >= 0 and high <= 255):
        raise ValueError(
            f"its values are {low:g} to {high:g}: give whole numbers from 0 to 255, or fractions from 0 to 1 "
            "(before any normalisation)"
        )
    return array.astype(np.uint8)


def _convert(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255 instead of scaling it
        picture = PIL.Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


__all__ = ["MAX_PIXELS", "load_pixels"]
