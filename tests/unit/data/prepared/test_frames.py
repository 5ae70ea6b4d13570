"""Of pictures with several frames only the first is read, which is counted and said."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.data.modalities.image_files import FRAMES, read_pixels
from mmscale.data.modalities.modality import Tally
from tests.unit.data.samples import image, picture, text, write_jsonl

FORMATS = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")


def frames(number: int, kind: str) -> bytes:
    """A file with different frames."""
    first, *others = (PIL.Image.fromarray(picture(seed, size=8)[..., 0]) for seed in range(number))
    content = io.BytesIO()
    first.save(content, kind, **({"save_all": True, "append_images": others} if others else {}))
    return content.getvalue()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_frames_are_counted(kind: str, number: int) -> None:
    tally: Tally = {}
    pixels = read_pixels(frames(number, kind), size=8, channels=1, tally=tally)
    assert tally[FRAMES] == (number > 1)
    again = read_pixels(frames(number, kind), size=8, channels=1)
    assert (pixels == again).all()
    if kind in ("PNG", "TIFF"):
        assert (pixels == picture(0, size=8)).all()


def test_a_damaged_later_frame_is_no_error() -> None:
    tally: Tally = {}
    content = frames(3, "GIF")
    read_pixels(content[: len(content) - 30], size=8, channels=1, tally=tally)
    assert tally["pictures"] == 1


def test_prepare_and_inspect_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, (kind, number) in enumerate([("GIF", 3), ("WEBP", 2), ("PNG", 1), ("PNG", 1)]):
        (tmp_path / f"{n}.{kind.lower()}").write_bytes(frames(number, kind))
    names = ["0.gif", "1.webp", "2.png", "3.png"]
    records = [{"id": name, "content": [image(name), text(f"shows {name}")]} for name in names]
    file, out = write_jsonl(tmp_path / "d.jsonl", records), str(tmp_path / "out")
    vocabulary = "vocab.modalities=[{name: text, size: 300}, {name: image, size: 16}]"
    images = [f"data.prepare.image.{one}" for one in ("kind=levels", "size=8", "channels=1")]
    assert main(["data", "prepare", "--documents", str(file), "--out", out, vocabulary, *images]) == 0
    said = "2 of 4 pictures have several frames (animations or pages): only the first one is used"
    assert capsys.readouterr().err.count(said) == 1
    assert main(["data", "inspect", out]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
