# image_vq.py on GPUs, as far as a machine without them shows it; the rest: tests/gpu/test_gpu_codes.py.
"""Tests of batches, devices and refusals of neural image tokenizers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.cli import main
from mmscale.data.modalities.fit import save_codec
from mmscale.data.modalities.image_vq import VQTokenizer, gpu_batch
from mmscale.data.modalities.text_tokens import FOLDER as TEXT_FOLDER
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.prepared import build
from mmscale.data.prepared.build import WorkSetup, build_parts
from mmscale.data.prepared.prepare import plan_shares, prepare
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError
from mmscale.runtime import device
from tests.unit.data.modalities.test_image_tokens import photos, save_model
from tests.unit.data.samples import config, corpus, files_of

KINDS = ("ChameleonVQVAE", "JanusVQVAE", "Emu3VQVAE")
no_gpu = pytest.mark.skipif(device.has_cuda(), reason="shows what a machine without CUDA says")


def vq_config(folder: Path, **more: Any) -> Any:
    image = {"kind": "vq", "path": str(save_model("JanusVQVAE", folder / "model")), "size": 16, "channels": 3}
    documents = [str(corpus(folder / "in", 20))]
    return config(vocab={"text": 300, "image": 64}, image=image, documents=documents, part_documents=4, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_codes_do_not_depend_on_the_batch(kind: str, batch: int, tmp_path: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(save_model(kind, tmp_path / "model"), size=16, channels=3)
    images = photos(70)
    wanted = tokenizer.encode(images)
    tokenizer._place(torch.device("cpu"), batch=batch)
    np.testing.assert_array_equal(tokenizer.encode(images), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_on_the_device(kind: str, tmp_path: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(save_model(kind, tmp_path / "model"), size=16, channels=3)
    tokenizer._place(torch.device("meta"), batch=16)  # a device without arithmetic: a tensor of the CPU is an error
    with torch.no_grad():
        codes = tokenizer._codes(torch.zeros(16, 16, 16, 3, dtype=torch.uint8, device="meta"))
        assert codes.device.type == "meta" and codes.numel() == 16 * 64
        with pytest.raises(RuntimeError, match="device"):
            tokenizer._codes(torch.zeros(16, 16, 16, 3, dtype=torch.uint8))


def test_batches_of_large_images_are_smaller() -> None:
    assert [gpu_batch(size) for size in (64, 256, 512, 768)] == [64, 64, 16, 8]


def test_processes_share_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device.numbered(number).index for number in range(5)] == [0, 1, 2, 0, 1]
    assert device.count() == 3


@no_gpu
def test_a_tokenizer_without_a_gpu(tmp_path: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(save_model("JanusVQVAE", tmp_path / "model"), size=16, channels=3)
    with pytest.raises(ConfigError, match="a GPU was asked for, and torch sees none"):
        tokenizer.use_device(0)
    assert device.count() == 0


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the devices that tokenizers were moved to."""
    numbers: list[int] = []
    monkeypatch.setattr(VQTokenizer, "use_device", lambda self, number: numbers.append(number))
    return numbers


def test_tasks_and_workers_use_different_gpus(
    tmp_path: Path, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = vq_config(tmp_path)
    shares = plan_shares(settings, tmp_path / "out", number=3, gpus=2, workers=1, progress=False)
    assert chosen == []  # the process that plans needs none
    for share in shares:
        share()
    assert chosen == [0, 1, 0]
    chosen.clear()
    setup = shares[0].setup
    for job in (0, 1, 2):  # as in new worker processes
        monkeypatch.setattr(build, "_worker", (setup, None, *_cells()))
        build._work(job, shares[0].jobs[0], 1)
    assert chosen == [1, 0, 1]
    chosen.clear()
    on_cpus = plan_shares(settings, tmp_path / "cpu", number=1, progress=False)
    on_cpus[0]()
    assert chosen == []


def _cells() -> tuple[Any, list[int]]:
    return type("Cell", (), {"value": 0})(), [0, 0, 0]


def test_tokenizers_that_know_no_gpu_stay_where_they_are(tmp_path: Path) -> None:
    vocabulary = Vocabulary(("text", "image"), ((0, 300), (300, 316)))
    TextTokenizer.of_bytes(size=300, specials=vocabulary.specials).save(tmp_path / TEXT_FOLDER)
    from mmscale.data.modalities.image_tokens import LevelsTokenizer

    save_codec(LevelsTokenizer(4, 1, 16), tmp_path / "image_tokenizer", measured={})
    setup = WorkSetup(tmp_path, vocabulary, 100, 0.0, False, gpus=2)
    assert setup.encoder(1).codecs["image"].tokens_per_item == 16
    assert build_parts(setup, [], workers=1, advance=lambda _: None) == []


@no_gpu
@pytest.mark.parametrize("tasks", [(), ("--tasks", "2")])
def test_gpus_that_this_machine_does_not_have_are_refused_first(
    tasks: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    image = f"data.prepare.image={{kind: vq, path: {tmp_path}, size: 16, channels: 3}}"
    settings = ["vocab.modalities=[{name: text, size: 300}, {name: image, size: 64}]", image]
    command = ["data", "prepare", "--documents", str(corpus(tmp_path / "in", 9)), "--out", str(out), *settings]
    assert main([*command, "--gpus", "2", *tasks]) != 0
    said = capsys.readouterr().err
    assert "--gpus 2, and this machine has 0" in said and "--cluster NAME" in said
    assert not out.exists()


@pytest.mark.parametrize("call", [prepare, functools.partial(plan_shares, number=2)], ids=["here", "on a cluster"])
def test_gpus_for_a_tokenizer_that_has_no_use_for_them(tmp_path: Path, call: Any) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 9))])
    with pytest.raises(ConfigError, match=r"image.kind is levels, which computes on the CPU"):
        call(settings, tmp_path / "out", gpus=1, progress=False)
    assert not (tmp_path / "out").exists()


@no_gpu
def test_a_share_on_a_node_without_a_gpu_makes_nothing(tmp_path: Path) -> None:
    (share,) = plan_shares(vq_config(tmp_path), tmp_path / "out", number=1, gpus=1, progress=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="torch sees none"):
        share()
    assert files_of(tmp_path / "out") == before and not (tmp_path / "out/manifest.json").exists()
