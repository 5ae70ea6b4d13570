# mmscale/data/modalities/image_tokens.py and image_vq.py: codes in range, images back, the same on every machine.
"""Tests of the image tokenizers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmscale.data.modalities.fit import QUALITY, save_codec
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.image_tokens import (
    KMeansTokenizer,
    LevelsTokenizer,
    ResidualTokenizer,
    quality,
)
from mmscale.data.modalities.patches import to_patches
from mmscale.errors import DataError

RNG = np.random.default_rng(0)


def photos(n: int, *, size: int = 16, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth random pictures uint8 [n, size, size, channels]."""
    rng = np.random.default_rng(n)
    y, x = np.mgrid[:size, :size] / size
    waves = rng.uniform(-3, 3, (2, n, channels, 1, 1))
    values = np.sin(waves[0] * 2 * x + waves[1] * 2 * y + rng.uniform(0, 6, (n, channels, 1, 1)))
    return np.rint((values + 1) * 127).astype(np.uint8).transpose(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(("levels", "channels"), [(17, 1), (256, 3), (2, 1)])
def test_levels_are_exact_for_images_with_so_many(levels: int, channels: int) -> None:
    tokenizer = LevelsTokenizer(8, channels, levels)
    codes = RNG.integers(0, levels, (5, 64 * channels))
    images = tokenizer.decode(codes)
    assert images.shape == (5, 8, 8, channels) and images.dtype == np.uint8
    np.testing.assert_array_equal(tokenizer.encode(images), codes)
    assert quality(tokenizer, images)["exact"] is True
    assert tokenizer.tokens_per_item == np.prod(tokenizer.grid) == 64 * channels


def test_levels_refuse_an_impossible_number() -> None:
    with pytest.raises(DataError, match=r"2\.\.256 codes, not 1"):
        LevelsTokenizer(8, 1, 1)


# ---------------------------------------------------------------------------------------------------------- kmeans


def fitted(codes: int = 32, *, patch: int = 4, channels: int = 3) -> KMeansTokenizer:
    patches = to_patches(photos(40, channels=channels), patch)
    return KMeansTokenizer.fit(patches, size=16, channels=channels, patch=patch, codes=codes)


def test_patches_and_codebook_draw_an_image_back() -> None:
    """With every patch in the codebook nothing is lost, so the order of patches and pixels is right."""
    images = RNG.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_patches(images, 4)[1].reshape(4, 4, 3), images[0, :4, 4:8])
    square = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    tokenizer = KMeansTokenizer.fit(to_patches(square, 2), size=8, channels=3, patch=2, codes=1000)
    assert tokenizer.vocab_size == 48  # distinct patches: the rest of the codes stays unused
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(square)), square)


@pytest.mark.parametrize(("patch", "channels"), [(4, 3), (2, 1), (8, 3)])
def test_nearest_code_by_a_plain_loop(patch: int, channels: int) -> None:
    tokenizer = fitted(patch=patch, channels=channels)
    images = photos(3, channels=channels)
    distances = [
        ((tokenizer.codebook_KD.astype(int) - patch_D.astype(int)) ** 2).sum(axis=1)
        for patch_D in to_patches(images, patch)
    ]
    expected = np.array([int(np.argmin(row)) for row in distances]).reshape(3, -1)
    np.testing.assert_array_equal(tokenizer.encode(images), expected)


def test_one_image_costs_less_than_a_pass_over_the_codebook() -> None:
    """Data preparation encodes image by image: what follows from the codebook alone is not computed every time."""
    base = KMeansTokenizer(32, 3, 32, RNG.integers(0, 256, (512, 3 * 32 * 32), dtype=np.uint8))
    sums = ResidualTokenizer(base, RNG.integers(-255, 256, (512, 3 * 32 * 32), dtype=np.int16))
    image = RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    for tokenizer in (base, sums):
        tracemalloc.start()
        try:
            tokenizer.encode(image)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < base.codebook_KD.nbytes // 4, "a copy of the codebook was made"


def test_kmeans_is_deterministic_and_better_than_grey() -> None:
    one, two = fitted(), fitted()
    assert one.fingerprint() == two.fingerprint() != fitted(codes=16).fingerprint()
    assert one.vocab_size <= 32 and one.grid == (4, 4)
    measured = quality(one, photos(41))
    assert measured["psnr_db"] > 14 and measured["exact"] is False  # grey alone: 11 dB
    assert quality(fitted(codes=128), photos(41))["psnr_db"] > measured["psnr_db"] + 1


# -------------------------------------------------------------------------------------------------------- residual


def residual(codes: int = 32, *, patch: int = 4) -> ResidualTokenizer:
    patches = to_patches(photos(40), patch)
    return ResidualTokenizer.fit(patches, base=fitted(codes, patch=patch), codes=codes)


@pytest.mark.parametrize("patch", [4, 8])  # 8: sums leave what float32 holds exactly
def test_residual_codes_by_a_plain_loop(patch: int) -> None:
    tokenizer = residual(patch=patch)
    images = photos(3)
    expected, drawn = [], []
    for patch_D in to_patches(images, patch).astype(int):
        one = int(np.argmin(((tokenizer.base.codebook_KD.astype(int) - patch_D) ** 2).sum(axis=1)))
        left_D = patch_D - tokenizer.base.codebook_KD[one]
        two = int(np.argmin(((tokenizer.residual_RD.astype(int) - left_D) ** 2).sum(axis=1)))
        expected += [one, tokenizer.base.vocab_size + two]
        drawn.append(np.clip(tokenizer.base.codebook_KD[one].astype(int) + tokenizer.residual_RD[two], 0, 255))
    codes = tokenizer.encode(images)
    assert codes.shape == (3, tokenizer.tokens_per_item) and tokenizer.grid == (16 // patch, 32 // patch)
    np.testing.assert_array_equal(codes, np.array(expected).reshape(3, -1))
    np.testing.assert_array_equal(to_patches(tokenizer.decode(codes), patch), np.array(drawn))


def test_residual_draws_better_than_one_book_of_as_many_codes() -> None:
    tokenizer, again = residual(), residual()
    assert tokenizer.fingerprint() == again.fingerprint() != residual(24).fingerprint()
    assert tokenizer.vocab_size <= 64
    images = photos(41)
    assert quality(tokenizer, images)["psnr_db"] > quality(fitted(64), images)["psnr_db"] + 1
    swapped = tokenizer.encode(images).reshape(-1, 2)[:, ::-1].reshape(41, -1)  # no model is sure to keep the order
    assert tokenizer.decode(swapped).shape == images.shape


def test_psnr_by_hand() -> None:
    tokenizer = LevelsTokenizer(1, 1, 2)
    images = np.array([0, 10], np.uint8).reshape(2, 1, 1, 1)  # 10 becomes 0: mean squared error 50
    assert quality(tokenizer, images)["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 50), abs=1e-3)


def test_patch_must_tile_the_image() -> None:
    with pytest.raises(DataError, match="patches of 3 pixels do not tile images of 8 pixels"):
        KMeansTokenizer(8, 1, 3, np.zeros((1, 9), np.uint8))


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("tokenizer", [LevelsTokenizer(16, 3, 256), fitted(), residual()])
def test_saved_tokenizer_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    save_codec(tokenizer, tmp_path / "image_tokenizer", measured={"psnr_db": 20.0})
    loaded = load_image_tokenizer(tmp_path / "image_tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(photos(2)), tokenizer.encode(photos(2)))
    assert json.loads((tmp_path / "image_tokenizer" / QUALITY).read_text()) == {"psnr_db": 20.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["image_tokenizer"]


def test_unreadable_image_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_image_tokenizer(tmp_path)
    fitted().save(tmp_path)
    (tmp_path / "codebook.npy").write_bytes(b"\x93NUMPY cut off")
    with pytest.raises(DataError, match="cannot be read"):
        load_image_tokenizer(tmp_path)
    (tmp_path / "image_tokenizer.json").write_text('{"kind": "jpeg"}')
    with pytest.raises(DataError, match="unknown kind 'jpeg'"):
        load_image_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------------------- vq


def save_model(kind: str, folder: Path) -> Path:
    """A tiny model with random weights, written by transformers."""
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    settings: dict[str, Any] = {
        "ChameleonVQVAE": {"num_embeddings": 64, "embed_dim": 8, "latent_channels": 8, "resolution": 16},
        "JanusVQVAE": {"num_embeddings": 64, "embed_dim": 8, "latent_channels": 8, "num_patches": 8},
        "Emu3VQVAE": {"codebook_size": 64, "attn_resolutions": [], "hidden_size": 32},
    }[kind]
    import torch

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**common, **settings)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["ChameleonVQVAE", "JanusVQVAE", "Emu3VQVAE"])
def test_vq(kind: str, tmp_path: Path) -> None:
    from mmscale.data.modalities.image_vq import VQTokenizer

    tokenizer = VQTokenizer.from_pretrained(save_model(kind, tmp_path / "model"), size=16, channels=3)
    images = photos(11)
    codes = tokenizer.encode(images)
    assert tokenizer.vocab_size == 64 and tokenizer.grid == (8, 8)
    assert codes.shape == (11, 64) and codes.min() >= 0 and codes.max() < 64
    for index in (0, 3, 10):  # an image's codes do not depend on its company
        np.testing.assert_array_equal(tokenizer.encode(images[index : index + 1])[0], codes[index])
    if kind == "ChameleonVQVAE":
        with pytest.raises(DataError, match="ChameleonVQVAE has no decoder"):
            tokenizer.decode(codes)
        assert "no decoder" in quality(tokenizer, images)["note"]
    else:
        drawn = tokenizer.decode(codes)
        assert drawn.shape == images.shape and drawn.dtype == np.uint8
    save_codec(tokenizer, tmp_path / "image_tokenizer", measured={})
    loaded = load_image_tokenizer(tmp_path / "image_tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(images), codes)


def test_vq_uses_the_model_own_normalisation(tmp_path: Path) -> None:
    from mmscale.data.modalities.image_vq import VQTokenizer

    folder = save_model("JanusVQVAE", tmp_path)
    plain = VQTokenizer.from_pretrained(folder, size=16, channels=3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    other = VQTokenizer.from_pretrained(folder, size=16, channels=3)
    assert plain.fingerprint() != other.fingerprint()


def test_vq_models_that_do_not_fit(tmp_path: Path) -> None:
    from mmscale.data.modalities.image_vq import VQTokenizer

    with pytest.raises(DataError, match="is not a model folder"):
        VQTokenizer.from_pretrained(tmp_path / "none", size=16, channels=3)
    folder = save_model("JanusVQVAE", tmp_path / "janus")
    with pytest.raises(DataError, match="makes 8 x 8 codes of images of 16 pixels, but the size is 32"):
        VQTokenizer.from_pretrained(folder, size=32, channels=3)
    with pytest.raises(DataError, match="shrinks by 2, which does not divide 15"):
        VQTokenizer.from_pretrained(folder, size=15, channels=3)
    with pytest.raises(DataError, match="takes 3 channels"):
        VQTokenizer.from_pretrained(folder, size=16, channels=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_res_blocks": 2}))
    with pytest.raises(DataError, match="lacks weights such as"):  # transformers would only warn
        VQTokenizer.from_pretrained(folder, size=16, channels=3)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(DataError, match="model of type 'llama'"):
        VQTokenizer.from_pretrained(folder, size=16, channels=3)


def whole_model(kind: str, folder: Path) -> Any:
    """A tiny Janus or Emu3 with all its parts, written by transformers; the model."""
    import torch
    import transformers

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0}
    vq: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    torch.manual_seed(1)
    if kind == "janus":
        own = {"num_embeddings": 64, "embed_dim": 8, "latent_channels": 8, "num_patches": 8, "projection_dim": 32}
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 64, "patch_size": 8, "projection_dim": 32}
        config: Any = transformers.JanusConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=vision,
            vq_config=vq | own | {"num_hidden_layers": 1},
        )
        model: Any = transformers.JanusForConditionalGeneration(config)
    else:
        own = {"codebook_size": 64, "attn_resolutions": [], "hidden_size": 32}
        names = {"<image>": 190} | {f"<|visual token {number:06}|>": 100 + number for number in range(64)}
        config = transformers.Emu3Config(vq_config=vq | own, text_config=text, vocabulary_map=names)
        model = transformers.Emu3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.model.vqmodel


@pytest.mark.parametrize("kind", ["janus", "emu3"])
def test_vq_within_a_whole_model(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its own weights and nothing of the rest; and without a report on the rest in every worker."""
    from mmscale.data.modalities.image_vq import VQTokenizer

    part = whole_model(kind, tmp_path / "whole")
    part.save_pretrained(tmp_path / "part")
    capfd.readouterr()
    tokenizer = VQTokenizer.from_pretrained(tmp_path / "whole", size=16, channels=3)
    assert capfd.readouterr() == ("", "")
    alone = VQTokenizer.from_pretrained(tmp_path / "part", size=16, channels=3)
    assert tokenizer.fingerprint() == alone.fingerprint()
    codes = tokenizer.encode(photos(2))
    np.testing.assert_array_equal(alone.encode(photos(2)), codes)
    save_codec(tokenizer, tmp_path / "image_tokenizer", measured={})
    loaded = load_image_tokenizer(tmp_path / "image_tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))
