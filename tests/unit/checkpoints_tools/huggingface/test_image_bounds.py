"""What a picture may cost, and which pictures are read: in training and in the exported processor alike."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.huggingface.shipped import pixels_moma
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Image
from mmscale.data.modalities import image_files
from tests.bounded_work import bounded_work
from tests.unit.data.samples import load_image

Reader = Callable[..., np.ndarray]


def training(content: bytes | Path, *, size: int, channels: int) -> np.ndarray:
    return load_image(Image(content, "x"), size=size, channels=channels)


READERS: dict[str, Reader] = {"training": training, "export": pixels_moma.load_pixels}
REFUSALS = (BadDocumentError, ValueError)
both = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
RNG = np.random.default_rng(0)


def saved(picture: PIL.Image.Image, form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=form, **settings)
    return stream.getvalue()


def png(width: int, height: int, *, colour: int = 0, bits: int = 8, pixels: bytes = b"") -> bytes:
    """A PNG that says this size, whatever pixels it has."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


class Peak:
    """The most memory that this process took inside, beyond what it had before [bytes]."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))


def test_the_two_have_the_same_bounds() -> None:
    for name in ("MAX_PIXELS", "MAX_NUMBERS", "MAX_ASPECT", "FORMATS", "_RESIZED_ASPECT", "_STRIP"):
        assert getattr(image_files, name) == getattr(pixels_moma, name)
    assert image_files._formats() == pixels_moma.formats()


BOMBS = {
    "1 x 65000": (png(1, 65_000, pixels=bytes(2 * 65_000)), "one side is more than 1000 times the other"),
    "65000 x 1": (png(65_000, 1, pixels=bytes(65_001)), "one side is more than 1000 times the other"),
    "2^31 x 2^31": (png(2**31 - 1, 2**31 - 1), "exceeds limit|too many"),
    "20000 x 20000": (png(20_000, 20_000), "exceeds limit|too many"),
    "108 megapixels": (png(12_000, 9_000, bits=1), "too many"),
    "0 x 0": (png(0, 0), "unreadable|cannot be read"),
    "floats": (saved(PIL.Image.new("F", (6_000, 5_000)), "TIFF", compression="tiff_deflate"), "too many"),
}


@both
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_unpacked(reader: Reader, name: str) -> None:
    content, said = BOMBS[name]
    with bounded_work(), Peak() as peak, pytest.raises(REFUSALS, match=said):
        reader(content, size=256, channels=3)
    assert peak.bytes < 64 << 20


@both
@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (3, 2900), (40, 4000)])
def test_long_pictures_take_no_more_memory_than_others(reader: Reader, shape: tuple[int, int]) -> None:
    """1 x 4000 pixels (100 bytes) took 1.1 GB at 256 pixels, because the short side was resized before the crop."""
    content = saved(PIL.Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)), "PNG")
    reader(content, size=256, channels=3)
    with Peak() as peak:
        found = reader(content, size=256, channels=3)
    assert found.shape == (256, 256, 3) and peak.bytes < 32 << 20


@both
def test_the_ends_of_a_long_picture_do_not_count(reader: Reader) -> None:
    """What is cut off before resizing is beyond the reach of the filter: the pixels are those of the whole picture."""
    for height, width in ((4, 64), (7, 63), (16, 400), (3, 100)):
        pixels = RNG.integers(0, 256, (height, width), dtype=np.uint8)
        size = height  # nothing is scaled: the centre as it is
        left = (width - size) // 2
        found = reader(saved(PIL.Image.fromarray(pixels), "PNG"), size=size, channels=1)[..., 0]
        assert (found == pixels[:, left : left + size]).all()


@both
def test_a_large_picture_with_transparency_is_converted_in_strips(reader: Reader) -> None:
    width, height = 3000, 2900  # 8.7 megapixels: 35 MB decoded, and 26 MB of RGB; 140 MB more without strips
    picture = PIL.Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 20).convert("RGB")
    picture.putalpha(PIL.Image.linear_gradient("L").resize((width, height)))
    content = saved(picture, "PNG", compress_level=1)
    with Peak() as peak:
        found = reader(content, size=64, channels=3)
    assert peak.bytes < 150 << 20
    white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
    whole = PIL.Image.alpha_composite(white, picture).convert("RGB")
    assert (found == reader(saved(whole, "PNG", compress_level=1), size=64, channels=3)).all()


# --- numbers that are no bytes ----------------------------------------------------------------------------------------


def numbers(values: Any, dtype: Any, form: str = "TIFF") -> bytes:
    return saved(PIL.Image.fromarray(np.asarray(values, dtype=dtype)), form)


RAMP = np.arange(64).reshape(8, 8) * 4
AS_BYTES = {
    "16 bits, PNG": (numbers(RAMP * 257, np.uint16, "PNG"), RAMP),
    "16 bits, TIFF": (numbers(RAMP * 257, np.uint16), RAMP),
    "16 bits, PGM": (saved(PIL.Image.fromarray((RAMP * 257).astype(np.int32)), "PPM"), RAMP),
    "32 bits": (numbers(RAMP, np.int32), RAMP),
    "floats to 1": (numbers(RAMP / 252, np.float32), np.rint((RAMP / 252).astype(np.float32).astype(float) * 255)),
    "floats to 255": (numbers(RAMP, np.float32), RAMP),
}
WITHOUT_BRIGHTNESS = {
    "32 bits of no scale": numbers(RAMP * 1000, np.int32),
    "negative": numbers(RAMP - 1, np.int32),
    "floats beyond 1": numbers(RAMP / 100, np.float32),
    "negative floats": numbers(RAMP / 252 - 0.5, np.float32),
    "NaN": numbers(np.where(RAMP == 4, np.nan, 0.5), np.float32),
    "infinite": numbers(np.where(RAMP == 4, np.inf, 0.5), np.float32),
}


@both
@pytest.mark.parametrize("name", AS_BYTES)
def test_numbers_are_scaled_not_clipped(reader: Reader, name: str) -> None:
    """They became white or black."""
    content, want = AS_BYTES[name]
    assert (reader(content, size=8, channels=1)[..., 0] == want).all()


@both
@pytest.mark.parametrize("name", WITHOUT_BRIGHTNESS)
def test_numbers_without_a_scale_are_refused(reader: Reader, name: str) -> None:
    with pytest.raises(REFUSALS, match="its values are"):
        reader(WITHOUT_BRIGHTNESS[name], size=8, channels=1)


@pytest.mark.parametrize("kind", [np.int32, np.float32, np.float64, np.int64])
def test_arrays_and_pictures_of_numbers_are_the_same(kind: Any) -> None:
    array = RAMP.astype(kind)
    picture = PIL.Image.fromarray(RAMP.astype(np.int32 if kind in (np.int32, np.int64) else np.float32))
    found = [pixels_moma.load_pixels(one, size=8, channels=1)[..., 0] for one in (array, picture)]
    assert (found[0] == RAMP).all() and (found[1] == RAMP).all()


@pytest.mark.parametrize(
    "view",
    [
        np.broadcast_to(np.float32(0), (10**6, 10**6)),
        np.broadcast_to(np.uint8(0), (10**6, 10**6, 3)),
        torch.zeros(1).expand(3, 10**6, 10**6),
        torch.zeros(1, dtype=torch.uint8).expand(10**6, 10**6),
    ],
    ids=["float32", "uint8", "tensor", "tensor of bytes"],
)
def test_views_that_claim_a_trillion_values(view: Any) -> None:
    with bounded_work(), Peak() as peak, pytest.raises(ValueError, match="too many values"):
        pixels_moma.load_pixels(view, size=8, channels=3)
    assert peak.bytes < 64 << 20


# --- formats ----------------------------------------------------------------------------------------------------------


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


@both
@pytest.mark.parametrize("name", ["picture.jpg", "picture.eps", "bytes"])
def test_ghostscript_is_never_run(reader: Reader, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts `gs` for EPS, by content and not by name."""
    marker, gs = tmp_path / "marker", tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {marker}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once, and remembered
    file = tmp_path / name
    file.write_bytes(EPS)
    with pytest.raises(REFUSALS, match="cannot identify"):
        reader(EPS if name == "bytes" else file, size=8, channels=3)
    assert not marker.exists()
    with PIL.Image.open(io.BytesIO(EPS)) as picture, pytest.raises(OSError):  # noqa: PT011  the trap works
        picture.load()
    assert marker.exists()


@both
@pytest.mark.parametrize("form", image_files._formats())
def test_every_format_of_the_list_is_read(reader: Reader, form: str) -> None:
    content = saved(PIL.Image.new("RGB", (8, 8), (200, 100, 50)), form)
    assert np.abs(reader(content, size=8, channels=3).astype(int) - [200, 100, 50]).max() <= 6  # lossy ones


@both
@pytest.mark.parametrize("form", ["TGA", "ICO", "PCX", "PDF", "EPS", "PSD"])
def test_other_formats_are_refused(reader: Reader, form: str) -> None:
    content = b"8BPS\0\1" + bytes(60) if form == "PSD" else saved(PIL.Image.new("RGB", (16, 16)), form)
    with pytest.raises(REFUSALS, match="cannot identify"):
        reader(content, size=8, channels=3)


# --- anything ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"]),
    form=st.sampled_from(["PNG", "TIFF", "JPEG", "GIF", "WEBP"]),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    channels=st.sampled_from([1, 3]),
    turned=st.integers(1, 8),
    damage=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=3),
    seed=st.integers(0, 99),
)
def test_both_read_the_same_or_refuse(
    mode: str,
    form: str,
    shape: tuple[int, int],
    channels: int,
    turned: int,
    damage: list[tuple[int, int]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        picture = PIL.Image.fromarray(rng.integers(0, 65536, shape, dtype=np.uint16))
    else:
        colours = PIL.Image.fromarray(rng.integers(0, 256, (*shape, 4), dtype=np.uint8))
        picture = colours.convert(mode) if mode in ("RGBA", "LA") else colours.convert("RGB").convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = turned
    try:
        content = bytearray(saved(picture, form, **({} if form in ("GIF", "TIFF") else {"exif": exif})))
    except (OSError, ValueError):  # a format that has no such mode
        return
    for place, value in damage:
        content[place % len(content)] = value
    found = []
    for reader in READERS.values():
        try:
            found.append(reader(bytes(content), size=9, channels=channels).tobytes())
        except REFUSALS:
            found.append(None)
    assert found[0] == found[1]
    assert damage or found[0] is not None
