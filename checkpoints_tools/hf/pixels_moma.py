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

MAX_PIXELS = 100_000_000  # larger pictures may be bombs: a PNG of a few kB can unpack to gigabytes


def load_pixels(image: Any, *, size: int, channels: int) -> np.ndarray:
    """Pixels of one image, uint8 [size, size, channels], as the training data had them.

    Args:
        image: a path, bytes, a Pillow image or a uint8 array.
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
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    return PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


def _convert(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255 instead of scaling it
        picture = PIL.Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


__all__ = ["MAX_PIXELS", "load_pixels"]
