"""The shipped image tokenizers against those of the data room, code by code and pixel by pixel."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from checkpoints_tools.huggingface.fast_tokenizer import write_text_tokenizer
from checkpoints_tools.huggingface.shipped.grammar_moma import ImageGrammar
from checkpoints_tools.huggingface.shipped.pixels_moma import load_pixels
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.data.documents.schema import Image
from mmscale.data.modalities.image_tokens import ImageTokenizer, KMeansTokenizer, LevelsTokenizer, ResidualTokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import Vocabulary
from tests.unit.data.samples import load_image

TEXT = 300


def tokenizer_of(kind: str, folder: Path) -> ImageTokenizer:
    rng = np.random.default_rng(0)
    if kind == "levels":
        return LevelsTokenizer(8, 1, 17)
    if kind == "kmeans":
        return KMeansTokenizer(8, 3, 4, np.unique(rng.integers(0, 256, (40, 48), dtype=np.uint8), axis=0))
    if kind == "kmeans-residual":
        patches = rng.integers(0, 256, (200, 48), dtype=np.uint8)
        base = KMeansTokenizer.fit(patches, size=8, channels=3, patch=4, codes=20)
        return ResidualTokenizer.fit(patches, base=base, codes=30)
    import transformers

    from mmscale.data.modalities.image_vq import VQTokenizer

    torch.manual_seed(0)
    common: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    own: dict[str, Any] = {
        "JanusVQVAE": {"num_embeddings": 64, "embed_dim": 8, "latent_channels": 8, "num_patches": 8},
        "Emu3VQVAE": {"codebook_size": 64, "attn_resolutions": [], "hidden_size": 32},
    }[kind]
    model = getattr(transformers, kind)(getattr(transformers, f"{kind}Config")(**common, **own))
    model.save_pretrained(folder)
    return VQTokenizer.from_pretrained(folder, size=16, channels=3)


def processor_with(image: ImageTokenizer, folder: Path, *, spare: int = 0) -> Any:
    """A folder as an export has it, loaded; with `spare` image ids that have no code."""
    end = TEXT + image.vocab_size + spare
    vocabulary = Vocabulary(("text", "image"), ((0, TEXT), (TEXT, end)))
    text = TextTokenizer.train(["a red bus"] * 3, size=TEXT)
    write_text_tokenizer(folder, text, vocabulary, rows=end + 7, context=512)
    image.save(folder / "image_tokenizer")
    ranges = [["text", 0, TEXT], ["image", TEXT, end]]
    (folder / "processor_config.json").write_text(json.dumps({"modalities": ranges}))
    return MomaProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["levels", "kmeans", "kmeans-residual", "JanusVQVAE", "Emu3VQVAE"])
def test_codes_and_pixels(kind: str, tmp_path: Path) -> None:
    image = tokenizer_of(kind, tmp_path / "model")
    processor = processor_with(image, tmp_path / "export")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, image.size, image.size, image.channels), dtype=np.uint8)
    codes = image.encode(images)
    for picture, own in zip(images, codes, strict=True):
        assert processor.encode([picture])[1:] == [3, *(own + TEXT).tolist(), 4]
    drawn = image.decode(codes)
    for own, pixels in zip(codes, drawn, strict=True):
        (piece,) = processor.pieces([1, 3, *(own + TEXT).tolist(), 4])
        assert (processor.pixels(piece) == pixels).all()
    processor.save_pretrained(tmp_path / "again")
    again = MomaProcessor.from_pretrained(tmp_path / "again")
    assert again.encode([images[0]]) == processor.encode([images[0]]) and again.image_range == processor.image_range


@pytest.mark.parametrize("kind", ["levels", "kmeans", "kmeans-residual", "JanusVQVAE", "Emu3VQVAE"])
def test_image_ids_without_a_code_are_never_generated(kind: str, tmp_path: Path) -> None:
    """A codebook may be smaller than the range of image ids. An image with such an id is left out."""
    image = tokenizer_of(kind, tmp_path / "model")
    processor = processor_with(image, tmp_path / "export", spare=3)
    first, end = processor.image_range
    scores = processor.image_grammar()(torch.tensor([[1, processor.boi]]), torch.zeros(1, end + 7))
    assert (scores[0] == 0).nonzero().flatten().tolist() == list(range(first, end - 3))
    last = np.full(image.tokens_per_item, image.vocab_size - 1) + TEXT
    assert len(processor.pieces([1, processor.boi, *last.tolist(), processor.eoi])) == 1
    last[-1] += 1
    assert processor.pieces([1, processor.boi, *last.tolist(), processor.eoi]) == []


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_as_for_training(mode: str, channels: int) -> None:
    rng = np.random.default_rng(2)
    if mode == "I;16":
        picture = PIL.Image.fromarray(rng.integers(0, 65536, (20, 33), dtype=np.uint16))
    else:
        colours = PIL.Image.fromarray(rng.integers(0, 256, (20, 33, 4), dtype=np.uint8), mode="RGBA")
        picture = colours if mode == "RGBA" else colours.convert("RGB").convert(mode)

    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    want = load_image(Image(stream.getvalue(), "x"), size=8, channels=channels)
    assert (load_pixels(stream.getvalue(), size=8, channels=channels) == want).all()


def test_grammar() -> None:
    grammar = ImageGrammar(10, 14, tokens=2, boi=3, eoi=4)
    rows = [[1, 5, 6, 7], [1, 5, 6, 3], [1, 5, 3, 11], [1, 3, 11, 12], [3, 11, 12, 4]]
    scores = grammar(torch.tensor(rows), torch.zeros(5, 14))
    allowed = [[index for index, value in enumerate(row) if value == 0] for row in scores.tolist()]
    text = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    image = [10, 11, 12, 13]
    assert allowed == [text, image, image, [4], text]


def test_text_of_a_user_never_becomes_a_special_or_an_image_token(tmp_path: Path) -> None:
    """Whatever names the shipped tokenizer has for them; also as the text around real images, and as a batch."""
    image = tokenizer_of("levels", tmp_path)
    processor = processor_with(image, tmp_path / "export")
    names = [*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()]
    assert {"<s>", "</s>", "<boi>", "<eoi>", "<pad>"} <= set(names) and len(set(names)) > 5
    text = "a" + " ".join(dict.fromkeys(names)) + "".join(names[:6])
    picture = np.zeros((8, 8, 1), np.uint8)
    plain = processor.encode([text])
    assert plain[0] == 1 and min(plain[1:]) >= 5 and max(plain) < TEXT
    assert processor(text=text, max_length=4096, return_tensors=None)["input_ids"] == [plain]
    codes = (image.encode(picture[None])[0] + TEXT).tolist()
    assert processor.encode([text, picture, text]) == [*plain, 3, *codes, 4, *plain[1:]]
    around = processor(text=[f"{text}<image>{text}"], images=[picture], max_length=4096, return_tensors=None)[
        "input_ids"
    ]
    assert around == [[*plain, 3, *codes, 4, *plain[1:]]]
    assert processor.pieces(plain) == [text]  # and it is read back as it was written
