"""Pictures that are not square or not opaque: `data.prepare.image.fit` and `background` in training and in exports."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from checkpoints_tools.huggingface.generator import Generator
from checkpoints_tools.huggingface.prompts import Prompt
from checkpoints_tools.huggingface.shipped import pixels_moma
from checkpoints_tools.huggingface.shipped.image_codes_moma import read_codes, write_codes
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.cli import main
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Image
from mmscale.data.modalities import image_files
from mmscale.data.modalities.image import ImageModality
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.image_settings import Fitting
from mmscale.data.modalities.modality import Tally
from mmscale.data.prepared.inspect_set import draw_sample, summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.questions import read_questions
from mmscale.inference.scores import encoder_of
from mmscale.tables.settings import IMAGE_FITS
from tests.unit.checkpoints_tools.huggingface.test_processing_moma import processor_with, tokenizer_of
from tests.unit.data.samples import config, image, load_image, text, write_jsonl

KINDS = ("1", "L", "LA", "P", "P transparent", "RGB", "RGBA", "I;16", "CMYK JPEG", "turned by EXIF")
SIZES = ((8, 8), (24, 24), (1, 1), (32, 8), (8, 32), (33, 20), (5, 3), (400, 1), (1, 400), (128, 32))
BACKGROUNDS = ((255, 255, 255), (10, 200, 30))
LEVELS = {"kind": "levels", "size": 4, "channels": 1}
IMAGES: dict[str, dict[str, Any]] = {
    "levels": LEVELS,
    "kmeans": {"kind": "kmeans", "size": 4, "channels": 3, "patch": 2},
    "two codebooks": {"kind": "kmeans", "size": 4, "channels": 3, "patch": 2, "residual": 6},
}


def encoded(kind: str, size: tuple[int, int]) -> bytes:
    """A file with a random picture."""
    width, height = size
    rng = np.random.default_rng([width, height])
    colours = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), mode="RGBA")
    stream = io.BytesIO()
    if kind == "I;16":
        PIL.Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16)).save(stream, "PNG")
    elif kind == "P transparent":
        palette = colours.convert("RGB").convert("P")
        palette.save(stream, "PNG", transparency=palette.getpixel((0, 0)))
    elif kind == "CMYK JPEG":
        colours.convert("RGB").convert("CMYK").save(stream, "JPEG")
    elif kind == "turned by EXIF":
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        colours.convert("RGB").save(stream, "JPEG", exif=exif)
    else:
        (colours if kind == "RGBA" else colours.convert("RGB").convert(kind)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("fit", IMAGE_FITS)
@pytest.mark.parametrize("kind", KINDS)
def test_exports_read_pictures_as_training_data_had_them(fit: str, kind: str) -> None:
    for size in SIZES:
        content = encoded(kind, size)
        for background in BACKGROUNDS:
            for channels in (1, 3):
                fitting = Fitting(fit, background)
                want = image_files.read_pixels(content, size=8, channels=channels, fitting=fitting)
                found = pixels_moma.load_pixels(content, size=8, channels=channels, fit=fit, background=background)
                assert want.shape == (8, 8, channels)
                np.testing.assert_array_equal(found, want, err_msg=f"{size} {background} {channels}")


@pytest.mark.parametrize("fit", IMAGE_FITS)
def test_too_long_pictures_are_refused(fit: str) -> None:
    content = encoded("RGB", (1, 4000))
    with pytest.raises(ValueError, match="more than 1000 times"):
        image_files.read_pixels(content, size=8, channels=3, fitting=Fitting(fit))
    with pytest.raises(ValueError, match="more than 1000 times"):
        pixels_moma.load_pixels(content, size=8, channels=3, fit=fit)


def test_tables_agree() -> None:
    assert list(image_files.FITS) == list(pixels_moma.FITS) == list(IMAGE_FITS)


def test_what_each_fit_does() -> None:
    """Red, green and blue from left to right: the ends are lost, or all is there, between bars or narrow."""
    wide = np.zeros((8, 24, 3), np.uint8)
    for place in range(3):
        wide[:, 8 * place : 8 * place + 8, place] = 255
    read = {
        fit: image_files.read_pixels(wide, size=24, channels=3, fitting=Fitting(fit, (9, 9, 9))) for fit in IMAGE_FITS
    }
    assert np.abs(read["crop"][:, 8:16].astype(int) - (0, 255, 0)).max() < 40
    assert (read["pad"][8:16] == wide).all() and (read["pad"][:8] == 9).all() and (read["pad"][16:] == 9).all()
    columns = read["stretch"][0]
    assert (read["stretch"] == columns).all() and columns[:6, 0].min() > 200 and columns[18:, 2].min() > 200


@pytest.mark.parametrize(("kind", "transparent"), [("RGBA", 1), ("P transparent", 1), ("RGB", 0), ("LA", 0), ("P", 0)])
def test_pictures_are_counted(kind: str, transparent: int) -> None:
    """A picture with an alpha channel that is opaque everywhere counts as opaque."""
    tally: Tally = {}
    for size in ((128, 32), (20, 20)):
        image_files.read_pixels(encoded(kind, size), size=8, channels=3, tally=tally)
    shares = {"oblong": 1, "transparent": 2 * transparent, "lost": 0.75, "enlarged": 0, "frames": 0}
    assert tally == {"pictures": 2} | shares
    with pytest.raises(ValueError, match="cannot identify"):
        image_files.read_pixels(b"nothing", size=8, channels=3, tally=tally)
    assert tally["pictures"] == 2


@pytest.mark.parametrize(("fit", "enlarged"), [("crop", 2), ("stretch", 2), ("pad", 1)])
def test_enlarged_pictures_are_counted(fit: str, enlarged: int) -> None:
    """The short side becomes the size, or the long side if the picture is padded; an equal size is not enlarged."""
    tally: Tally = {}
    for size in ((64, 8), (8, 8), (16, 16)):
        image_files.read_pixels(encoded("RGB", size), size=16, channels=3, fitting=Fitting(fit), tally=tally)
    assert tally["enlarged"] == enlarged


def test_small_pictures_are_said_to_be_enlarged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = config(
        documents=[str(documents(tmp_path))],
        image={"kind": "kmeans", "size": 16, "channels": 3, "patch": 4},
        vocab={"text": 300, "image": 40},
        held_out=0,
    )
    prepare(ready, tmp_path / "out")
    assert "6 of 6 pictures were smaller than 16 x 16: they are enlarged" in capsys.readouterr().err


def documents(folder: Path) -> Path:
    """Six documents with a picture each: two wide, one of them transparent; four square ones."""
    records = []
    for number in range(6):
        size = (32, 8) if number < 2 else (12, 12)
        (folder / "img").mkdir(parents=True, exist_ok=True)
        kind = "RGBA" if number == 1 else "RGB"
        (folder / f"img/{number}.png").write_bytes(
            encoded(kind, (size[0] + 4 * number, size[1] + number)) if number < 2 else encoded(kind, size)
        )
        records.append({"id": f"d{number}", "content": [text(f"picture {number}"), image(f"img/{number}.png")]})
    return write_jsonl(folder / "docs.jsonl", records)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("fit", IMAGE_FITS)
def test_preparation_says_it_and_everybody_keeps_it(
    fit: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set, what inspect draws, questions and the exported processor get the same codes."""
    background = [10, 200, 30]
    settings = IMAGES[kind] | {"fit": fit, "background": background}
    ready = config(documents=[str(documents(tmp_path))], image=settings, vocab={"text": 300, "image": 40}, held_out=0)
    out = tmp_path / "out"
    prepare(ready, out)
    said = capsys.readouterr().err
    share = f"{((1 - 8 / 32) + (1 - 9 / 36)) / 2:.0%}"
    assert f"2 of 6 pictures were not square: {IMAGE_FITS[fit].done.format(share=share)}" in said, said
    assert f"1 of 6 pictures have transparent pixels: they show {background}" in said, said
    own = summary(out)["image_tokenizer"]
    assert (own["fit"], own["background"], len(own["remarks"])) == (fit, background, 2)

    tokenizer = load_image_tokenizer(out / "image_tokenizer")
    assert tokenizer.fitting == Fitting(fit, (10, 200, 30))
    manifest = read_manifest(out)
    (part,) = manifest.splits["train"].parts
    low = manifest.ranges[1][0]
    processor = processor_with(tokenizer, tmp_path / "export", spare=40 - tokenizer.vocab_size)
    processor.save_pretrained(tmp_path / "again")
    again = MomaProcessor.from_pretrained(tmp_path / "again")
    data = ready.model_copy(update={"data": ready.data.model_copy(update={"path": str(out)})})
    asked = write_jsonl(
        tmp_path / "which.jsonl",
        [{"content": [image("img/0.png"), text("it is")], "choices": [" a", " b"], "answer": 0}],
    )
    (question,) = read_questions(asked, encoder_of(data))
    for number in range(6):
        ids = read_document(out, part, number)
        codes = [int(one) for one in ids if one >= low]
        file = tmp_path / f"img/{number}.png"
        for reader in (processor, again):
            assert [one for one in reader.encode([file]) if one >= low] == codes
        drawn = draw_sample(out, number, tmp_path / "drawn")
        want = tokenizer.decode(np.array([codes]) - low)[0]
        found = np.asarray(PIL.Image.open(drawn["images"][0])).reshape(want.shape)
        np.testing.assert_array_equal(found, want)
        if number == 0:
            assert [one for one in question.ids if one >= low] == codes


def test_sets_with_the_defaults_stay_what_they_are(tmp_path: Path) -> None:
    """Neither the record of the source nor the tokenizer's file and fingerprint mention the new settings."""
    file = str(documents(tmp_path))
    prepare(config(documents=[file], image=LEVELS), tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out/source.json").read_text())["settings"]["image"]
    assert record.keys() == {"kind", "size", "channels", "patch", "path", "fit_patches"}
    own = json.loads((tmp_path / "out/image_tokenizer/image_tokenizer.json").read_text())
    assert own == LEVELS | {"levels": 16}
    same = config(documents=[file], image=LEVELS | {"fit": "crop", "background": [255, 255, 255]})
    assert prepare(same, tmp_path / "out", progress=False) == read_manifest(tmp_path / "out")


def test_another_fit_is_another_tokenizer(tmp_path: Path) -> None:
    prints = set()
    for fit in IMAGE_FITS:
        for background in BACKGROUNDS:
            for kind in ("levels", "kmeans", "kmeans-residual"):
                tokenizer = tokenizer_of(kind, tmp_path)
                (tokenizer.base if kind == "kmeans-residual" else tokenizer).fitting = Fitting(fit, background)  # type: ignore[attr-defined]
                tokenizer.fitting = Fitting(fit, background)
                prints.add(tokenizer.fingerprint())
    assert len(prints) == 3 * 2 * 3


@pytest.mark.parametrize("fit", IMAGE_FITS)
def test_a_neural_tokenizer_keeps_it(fit: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("JanusVQVAE", tmp_path / "model")
    before = tokenizer.fingerprint()
    tokenizer.fitting, tokenizer._digest = Fitting(fit, (1, 2, 3)), ""  # type: ignore[attr-defined]
    assert tokenizer.fingerprint() != before
    tokenizer.save(tmp_path / "saved")
    assert load_image_tokenizer(tmp_path / "saved").fitting == tokenizer.fitting
    (tmp_path / "export").mkdir()
    tokenizer.save(tmp_path / "export/image_tokenizer")
    codes = read_codes(tmp_path / "export")
    assert codes is not None and (codes.fit, codes.background) == (fit, (1, 2, 3))
    write_codes(codes, tmp_path / "rewritten")
    assert load_image_tokenizer(tmp_path / "rewritten").fingerprint() == tokenizer.fingerprint()


def test_like_refuses_another_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in a file or on the command line; not said, the fit of the first data set is taken over."""
    file, one = documents(tmp_path), tmp_path / "one"
    spec = tmp_path / "spec.yaml"

    def written(image: str) -> str:
        spec.write_text(
            "vocab: {modalities: [{name: text, size: 300}, {name: image, size: 16}]}\n"
            "model: {kind: dense, num_layers: 1, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 1}\n"
            f"data: {{prepare: {{documents: [{file}], workers: 1, "
            f"image: {{kind: levels, size: 4, channels: 1{image}}}}}}}\n"
        )
        return str(spec)

    assert main(["data", "prepare", written(", fit: pad"), "--out", str(one)]) == 0
    like = ["--like", str(one), "--out", str(tmp_path / "two")]
    assert main(["data", "prepare", written(", fit: stretch"), *like]) == 3
    said = capsys.readouterr().err
    assert (
        "its pictures have fit pad, data.prepare.image.fit is stretch" in said
        and "set data.prepare.image.fit to pad" in said
    )
    assert main(["data", "prepare", "--documents", str(file), "data.prepare.image.fit=crop", *like]) == 3
    assert "its pictures have fit pad, data.prepare.image.fit is crop" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    assert main(["data", "prepare", written(""), *like]) == 0
    first, second = read_manifest(one), read_manifest(tmp_path / "two")
    assert first.tokenizers == second.tokenizers
    reused = f"data.prepare.image.path={one}/image_tokenizer"
    assert main(["data", "prepare", written(""), reused, "--out", str(tmp_path / "three")]) == 2
    assert "is for pictures with fit pad" in capsys.readouterr().err


def test_bad_colours_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for setting, cause in (("fit=squash", "crop"), ("background=[1,2]", "background"), ("background=[1,2,256]", "255")):
        assert main(["config", "check", "configs/quickstart.yaml", f"data.prepare.image.{setting}"]) == 2
        assert cause in capsys.readouterr().err


def test_an_unreadable_picture_is_a_bad_document() -> None:
    with pytest.raises(BadDocumentError, match="x is unreadable"):
        load_image(Image(b"nothing", "x"), size=4, channels=1)
    assert ImageModality.remarks({}, tokenizer_of("levels", Path())) == []


@pytest.mark.parametrize("fit", IMAGE_FITS)
def test_what_is_said_of_a_prompts_picture_is_what_is_done_to_it(fit: str, tmp_path: Path) -> None:
    """`mmscale sample --image` treats a picture as training did, and names that and nothing else."""
    tokenizer = tokenizer_of("levels", tmp_path)
    tokenizer.fitting = Fitting(fit, (255, 255, 255))  # type: ignore[attr-defined]
    edge = tokenizer.size
    files = []
    for width, height in ((3 * edge, edge), (3 * edge, 3 * edge), (edge, edge)):
        files.append(tmp_path / f"{width}x{height}.png")
        PIL.Image.new("L", (width, height)).save(files[-1])
    generator = Generator(config(), None, "none", None, processor_with(tokenizer, tmp_path / "export"))
    wide, large = generator.resized(Prompt("", images=tuple(files)))
    verbs = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}
    assert wide.endswith(f"has {3 * edge} x {edge} pixels, scaled and {verbs[fit]} to {edge} x {edge}")
    assert large.endswith(f"has {3 * edge} x {3 * edge} pixels, scaled to {edge} x {edge}")
