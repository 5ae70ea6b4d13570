"""Image files to pixels of one size, and pixels to PNG. Pillow only.

What becomes of the pixels is image_tokens.py. No torch here.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from mmscale.data.documents import BadDocumentError, Image

# 100 megapixels of RGB are 300 MB; a PNG of a few kB may unpack to that, so larger pictures are refused before.
MAX_PIXELS = 100_000_000


def load_image(image: Image, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels of one image: the short side resized to `size`, then the centre cropped.

    An image of this size already keeps its pixels as they are.

    Args:
        image: file, bytes or pixels.
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.

    Returns:
        uint8 [size, size, channels]

    Raises:
        BadDocumentError: the image cannot be decoded.
    """
    try:
        with warnings.catch_warnings():  # palette, EXIF and bomb warnings: the picture is either read or refused
            warnings.simplefilter("ignore")
            with _open(image) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise BadDocumentError(f"image {image.name} has {opened.width}x{opened.height} pixels, too many")
                picture = _convert(PIL.ImageOps.exif_transpose(opened), channels)
    except BadDocumentError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files, struct.error included
        raise BadDocumentError(f"image {image.name} is unreadable: {error}") from error
    if picture.size != (size, size):
        scale = size / min(picture.size)
        resized = tuple(max(size, round(edge * scale)) for edge in picture.size)
        picture = picture.resize((resized[0], resized[1]), PIL.Image.Resampling.LANCZOS)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def _open(image: Image) -> PIL.Image.Image:
    source = image.source
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else source)
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _convert(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255 instead of scaling it
        picture = PIL.Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def to_picture(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    """Pixels uint8 [H, W, C] as a Pillow image."""
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_png(pixels: NDArray[np.uint8], file: Path) -> None:
    """Write pixels uint8 [H, W, C] as a PNG file."""
    to_picture(pixels).save(file, format="PNG")
