"""Image files to pixels of one size, and pixels to PNG. Pillow only.

What becomes of the pixels is image_tokens.py. No torch here.
"""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from mmscale.data.documents import BadDocumentError, Image

# Bounds on the memory that a picture takes. The exported processor (checkpoints_tools/hf/pixels_moma.py) has the same.
# A PNG of a few kB may unpack to 300 MB of RGB: larger pictures are refused before they are decoded.
MAX_PIXELS = 100_000_000
# Numbers of 32 bits take several times the memory of bytes while they are scaled.
MAX_NUMBERS = 25_000_000
# The short side is resized to the wanted edge and the centre cropped: 1 x 65000 pixels would become 256 x 16 million.
# So the ends of a long picture are cut off before; the filter does not reach them. Longer ones are refused.
MAX_ASPECT = 1000  # one side to the other
_RESIZED_ASPECT = 8
# Formats that Pillow decodes itself. It would run Ghostscript for EPS, whatever a file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_STRIP = 1 << 22  # pixels converted at a time: transparency takes three copies of them
_ORIENTATION = 0x0112  # of EXIF


def load_image(image: Image, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels of one image: the short side resized to `size`, then the centre cropped.

    An image of this size already keeps its pixels as they are. Formats, sizes and proportions are bounded by the
    constants above.

    Args:
        image: file, bytes or pixels.
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.

    Returns:
        uint8 [size, size, channels]

    Raises:
        BadDocumentError: the image cannot be decoded, or is beyond the bounds.
    """
    try:
        with warnings.catch_warnings():  # palette, EXIF and bomb warnings: the picture is either read or refused
            warnings.simplefilter("ignore")
            with _open(image) as opened:
                _check_bounds(opened)
                picture = _convert(_upright(opened), channels)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files, struct.error included
        raise BadDocumentError(f"image {image.name} is unreadable: {error or type(error).__name__}") from error
    picture = _fitted(picture, size)
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def _open(image: Image) -> PIL.Image.Image:
    source = image.source
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else source)
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _check_bounds(picture: PIL.Image.Image) -> None:
    """Refuse a picture by its header, before it is decoded.

    Raises:
        ValueError: it has too many pixels, or is too long for its width.
    """
    width, height = picture.size
    if width * height > (MAX_NUMBERS if picture.mode in ("I", "F") else MAX_PIXELS):
        raise ValueError(f"it has {width}x{height} pixels, too many")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width}x{height} pixels, one side is more than {MAX_ASPECT} times the other")


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """As a camera wants it shown. Pillow would copy a picture that stands upright already."""
    return PIL.ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture


def _fitted(picture: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The short side resized to `size`, the centre cropped; a picture of this size as it is."""
    if picture.size == (size, size):
        return picture
    picture = _without_ends(picture)
    scale = size / min(picture.size)
    width, height = (max(size, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _without_ends(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The middle of a picture that is longer than _RESIZED_ASPECT times its short side."""
    width, height = picture.size
    most = _RESIZED_ASPECT * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def _convert(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """Grey or RGB, transparency on white; strip by strip, so that large pictures take less memory."""
    picture = _as_bytes(picture)
    width, height = picture.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return _opaque(picture, channels)
    whole = PIL.Image.new("L" if channels == 1 else "RGB", picture.size)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(height, top + rows)))
        whole.paste(_opaque(strip, channels), (0, top))
    return whole


def _as_bytes(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of numbers as one of bytes, which Pillow's `convert` would clip at 255 instead of scaling them.

    Sixteen bits are shifted. Files of 32-bit numbers do not say which of them is white: see `_brightness`.

    Raises:
        ValueError: values have no brightness.
    """
    sixteen = picture.mode.startswith("I;16")
    if not sixteen and picture.mode not in ("I", "F"):
        return picture
    values = np.asarray(picture)
    if sixteen or (picture.mode == "I" and picture.format in ("PNG", "PPM")):  # Pillow scales these to 0..65535
        return PIL.Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    return PIL.Image.fromarray(_brightness(values))


def _brightness(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole numbers and floats from 0 to 255 as they are, floats from 0 to 1 scaled to 0..255.

    Raises:
        ValueError: values are outside of that.
    """
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if not (low >= 0 and high <= 255 and bool((values == np.rint(values)).all())):  # a NaN equals nothing
        raise ValueError(
            f"its values are {low:g} to {high:g}, of {values.itemsize * 8} bits: only whole numbers from 0 to 255 and "
            "fractions from 0 to 1 have a brightness; save it with 8 or 16 bits"
        )
    return values.astype(np.uint8)


def _opaque(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
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
