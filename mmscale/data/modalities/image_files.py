"""Converts image files to pixels of one size, and pixels to PNG. Pillow only.

image_tokens.py converts pixels to codes. No torch here.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
from numpy.typing import NDArray

from mmscale.data.modalities.image_settings import Fitting
from mmscale.data.modalities.modality import Tally, count

# Bounds on the memory for a picture, as in the exported processor (huggingface/shipped/pixels_moma.py). A PNG of a few
# kB may unpack to 300 MB of RGB. Larger pictures are refused before they are decoded.
MAX_PIXELS = 100_000_000
# The bound for 32-bit pixels, which take several times the memory of bytes while they are scaled.
MAX_NUMBERS = 25_000_000
# Before a crop the short side is resized to the wanted edge: 1 x 65000 pixels would become 256 x 16 million. So the
# ends of a long picture are cut off before; the filter does not reach them. Longer ones are refused, whatever the fit.
MAX_ASPECT = 1000  # one side to the other
_RESIZED_ASPECT = 8
# Formats that Pillow decodes itself. For EPS it would run Ghostscript, whatever the file's name is.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_STRIP = 1 << 22  # pixels converted at a time; transparency needs three copies of them
_ORIENTATION = 0x0112  # tag of EXIF
_DEFAULT = Fitting()
Colour = tuple[int, int, int]  # red, green, blue, 0..255
# Keys of the tally of read pictures. LOST is the sum of 1 - short side / long side over pictures that are not square.
PICTURES, OBLONG, TRANSPARENT, LOST, ENLARGED = "pictures", "oblong", "transparent", "lost", "enlarged"
FRAMES = "frames"  # pictures with several frames
# Formats with animations or pages. In JPEG files of phones further pictures are previews of the first one.
_WITH_FRAMES = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")


def read_pixels(
    source: Path | bytes | NDArray[Any],
    *,
    size: int,
    channels: int,
    fitting: Fitting = _DEFAULT,
    tally: Tally | None = None,
) -> NDArray[np.uint8]:
    """Pixels of one image as a square.

    The pixels of an image that already has this size are unchanged. Formats, sizes and proportions are bounded by the
    constants above.

    Args:
        source: file, bytes or pixels.
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB).
        fitting: how other proportions are converted, and the colour under transparency.
        tally: counts pictures, and those that were not square, had transparent pixels or several frames, or were
            enlarged.

    Returns:
        uint8 [size, size, channels]

    Raises:
        ValueError: the image cannot be decoded, or exceeds the bounds.
    """
    try:
        with warnings.catch_warnings():  # ignore palette, EXIF and bomb warnings: the picture is either read or refused
            warnings.simplefilter("ignore")
            with open_image(source) as opened:
                _check_bounds(opened)
                shown = _upright(opened)
                picture, transparent = _convert(shown, channels, fitting.background)
                several = tally is not None and _has_frames(opened)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files, struct.error included
        raise ValueError(str(error) or type(error).__name__) from error
    if tally is not None:
        short, long = sorted(picture.size)
        scaled = long if fitting.fit == "pad" else short  # the side that becomes `size`
        seen = {PICTURES: 1, OBLONG: short != long, TRANSPARENT: transparent, LOST: 1 - short / long, FRAMES: several}
        count(tally, seen | {ENLARGED: scaled < size})
    if picture.size != (size, size):
        picture = FITS[fitting.fit](picture, size, fitting.background)
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def open_image(source: Path | bytes | NDArray[Any]) -> PIL.Image.Image:
    """A picture of one of FORMATS, with its header read. Pillow raises almost anything for a damaged file."""
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else source)
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


def _has_frames(opened: PIL.Image.Image) -> bool:
    """Whether a file has more frames than the first, which was read."""
    if opened.format not in _WITH_FRAMES:
        return False
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # the next frame is damaged, and the first one is not
        return True


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def salvaged(source: Path | bytes) -> NDArray[np.uint8]:
    """The readable part of a damaged picture: its rows up to the damage. Damaged EXIF and text data are ignored.

    Returns:
        uint8 [H, W] or [H, W, C], for `read_pixels`.

    Raises:
        ValueError: nothing can be read, or the picture exceeds the bounds.
    """
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    # A global of Pillow, which has no such argument; a worker reads one picture at a time.
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(source) as opened:
                _check_bounds(opened)
                opened.load()
                try:
                    picture = _upright(opened)
                except Exception:  # damaged EXIF: the picture is not rotated
                    picture = opened
                picture = _as_bytes(picture)
                return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    except Exception as error:  # as in `read_pixels`
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


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
    """The picture with EXIF's orientation applied. Pillow would copy even a picture that is upright already."""
    return PIL.ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture


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


# Functions that make a square of an opaque picture (L or RGB) of another size, by the names of IMAGE_FITS.
FITS: Mapping[str, Callable[[PIL.Image.Image, int, Colour], PIL.Image.Image]] = {
    "crop": _cropped,
    "pad": _padded,
    "stretch": _stretched,
}


def _without_ends(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The middle of a picture whose long side is more than _RESIZED_ASPECT times its short side."""
    width, height = picture.size
    most = _RESIZED_ASPECT * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def _convert(picture: PIL.Image.Image, channels: int, background: Colour) -> tuple[PIL.Image.Image, bool]:
    """Grey or RGB on the background, and whether any pixel was transparent.

    Works strip by strip, so that large pictures need less memory.
    """
    picture = _as_bytes(picture)
    width, height = picture.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return _opaque(picture, channels, background)
    whole, any_transparent = PIL.Image.new("L" if channels == 1 else "RGB", picture.size), False
    for top in range(0, height, rows):
        strip, transparent = _opaque(picture.crop((0, top, width, min(height, top + rows))), channels, background)
        whole.paste(strip, (0, top))
        any_transparent |= transparent
    return whole, any_transparent


def _as_bytes(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a picture of 16- or 32-bit pixels to bytes by scaling; Pillow's `convert` would clip at 255.

    16-bit values are shifted. Files of 32-bit pixels do not say which value is white: see `_brightness`.

    Raises:
        ValueError: the values cannot be interpreted as brightness.
    """
    sixteen = picture.mode.startswith("I;16")
    if not sixteen and picture.mode not in ("I", "F"):
        return picture
    values = np.asarray(picture)
    if sixteen or (picture.mode == "I" and picture.format in ("PNG", "PPM")):  # Pillow scales these to 0..65535
        return PIL.Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    return PIL.Image.fromarray(_brightness(values))


def _brightness(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers and floats from 0 to 255 unchanged, floats from 0 to 1 scaled to 0..255.

    Raises:
        ValueError: values are outside of that.
    """
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if not (low >= 0 and high <= 255 and bool((values == np.rint(values)).all())):  # false for NaN
        raise ValueError(
            f"its values are {low:g} to {high:g}, of {values.itemsize * 8} bits: only whole numbers from 0 to 255 and "
            "fractions from 0 to 1 have a brightness; save it with 8 or 16 bits"
        )
    return values.astype(np.uint8)


def _opaque(picture: PIL.Image.Image, channels: int, background: Colour) -> tuple[PIL.Image.Image, bool]:
    transparent = False
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        transparent = bool((np.asarray(picture.getchannel("A")) < 255).any())
        under = PIL.Image.new("RGBA", picture.size, (*background, 255))
        picture = PIL.Image.alpha_composite(under, picture)
    return picture.convert("L" if channels == 1 else "RGB"), transparent


def to_picture(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    """Pixels uint8 [H, W, C] as a Pillow image."""
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_png(pixels: NDArray[np.uint8], file: Path) -> None:
    """Write pixels uint8 [H, W, C] as a PNG file."""
    to_picture(pixels).save(file, format="PNG")
