"""On a GPU: codes of neural image tokenizers are those of the CPU, and a data set has the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmscale.data.modalities.image_vq import VQTokenizer
from mmscale.data.prepared.prepare import prepare
from tests.unit.data.modalities.test_image_tokens import photos, save_model
from tests.unit.data.modalities.test_vq_on_gpus import KINDS, vq_config
from tests.unit.data.samples import files_of


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(save_model(kind, tmp_path / "model"), size=16, channels=3)
    images, digest = photos(70), tokenizer.fingerprint()
    wanted = tokenizer.encode(images)
    tokenizer.use_device(0)
    np.testing.assert_array_equal(tokenizer.encode(images), wanted)
    tokenizer._digest = ""
    assert tokenizer.fingerprint() == digest
    if kind != "ChameleonVQVAE":
        assert tokenizer.decode(wanted).shape == images.shape


def test_a_data_set_has_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    settings = vq_config(tmp_path)
    prepare(settings, tmp_path / "cpu", progress=False)
    prepare(settings, tmp_path / "gpu", gpus=1, progress=False)
    assert files_of(tmp_path / "gpu") == files_of(tmp_path / "cpu")
