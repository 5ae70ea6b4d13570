# mmscale/data/prepared/inspect_set.py: what the manifest and the tables say, and documents drawn back.
"""Tests of looking into a data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.prepared.inspect_set import draw_sample, summary
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
from tests.unit.data.modalities.test_image_tokens import save_model
from tests.unit.data.samples import config, corpus, image, picture, save_picture, text, write_jsonl

VOCAB = {"text": 300, "image": 16, "speech": 10}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    for seed in (1, 2):
        save_picture(folder / f"{seed}.png", seed)
    speech = {"type": "tokens", "modality": "speech", "ids": [0, 9]}
    records = [
        {"id": "a", "content": [text("zwei Bilder:\n"), image("1.png"), image("2.png"), text(" 漢"), speech]},
        {"id": "b", "content": [text("<boi> is only text")], "loss": "text"},
        {"id": "c", "content": [text("bad"), image("none.png")]},
    ]
    settings = config(
        vocab=VOCAB, documents=[str(write_jsonl(folder / "d.jsonl", records))], held_out=0, part_documents=1
    )
    prepare(settings, folder / "out", progress=False)
    return folder / "out"


def test_summary(prepared: Path) -> None:
    found = summary(prepared)
    assert json.loads(json.dumps(found)) == found
    train = found["splits"]["train"]
    assert train["documents"] == 2 and train["tokens"]["image"] == 32 and train["tokens"]["speech"] == 2
    total = sum(train["tokens"].values())
    assert train["document_tokens"]["mean"] == total / 2
    assert train["document_tokens"]["shortest"] + train["document_tokens"]["longest"] == total
    assert found["splits"]["validation"]["documents"] == 0
    assert found["vocabulary"]["ranges"] == {"text": [0, 300], "image": [300, 316], "speech": [316, 326]}
    assert found["image_tokenizer"]["kind"] == "levels" and found["image_tokenizer"]["exact"] is True
    assert found["rejected"] == 1


def test_document_is_drawn_back(prepared: Path, tmp_path: Path) -> None:
    found = draw_sample(prepared, 0, tmp_path / "pictures")
    marks = "[image 0: 16 tokens]<eoi><boi>[image 1: 16 tokens]"
    assert found["text"] == f"<s>zwei Bilder:\n<boi>{marks}<eoi> 漢[speech: 2 tokens]</s>"
    kinds = [item["type"] for item in found["content"]]
    assert kinds == ["text", "image", "image", "text", "tokens"]
    assert found["content"][4] == {"type": "tokens", "modality": "speech", "ids": [0, 9]}
    for file, seed in zip(found["images"], (1, 2), strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), picture(seed)[..., 0])
    assert PIL.Image.open(found["sheet"]).width == 640
    assert found["tokens"]["image"] == 32 and found["loss"] == ["text", "image", "speech"]


def test_second_part_and_text_only(prepared: Path, tmp_path: Path) -> None:
    found = draw_sample(prepared, 1, tmp_path)
    assert found["text"] == "<s><boi> is only text</s>"
    assert found["content"] == [{"type": "text", "text": "<boi> is only text"}]
    assert found["images"] == [] and found["loss"] == ["text"]
    assert [file.name for file in tmp_path.iterdir()] == ["train-1-sheet.png"]


def test_what_is_not_there(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split train .* has no document 2; ask for 0\.\.1"):
        draw_sample(prepared, 2, tmp_path)
    with pytest.raises(DataError, match="has no document -1"):
        draw_sample(prepared, -1, tmp_path)
    with pytest.raises(DataError, match="no split 'test'; one of train, validation"):
        draw_sample(prepared, 0, tmp_path, split="test")
    with pytest.raises(DataError, match="there is no folder"):
        summary(tmp_path / "none")


def test_tokenizer_that_cannot_draw_shows_codes(tmp_path: Path) -> None:
    model = save_model("ChameleonVQVAE", tmp_path / "model")
    vq = {"kind": "vq", "size": 16, "channels": 3, "path": str(model)}
    settings = config(
        vocab={"text": 300, "image": 64}, documents=[str(corpus(tmp_path / "in", 4))], image=vq, held_out=0
    )
    prepare(settings, tmp_path / "out", progress=False)
    found = draw_sample(tmp_path / "out", 0, tmp_path / "pictures")
    (codes,) = [item for item in found["content"] if item["type"] == "tokens"]
    assert len(codes["ids"]) == 64 and found["images"] == []
    assert "psnr_db" in summary(tmp_path / "out")["image_tokenizer"]


def test_images_through_a_neural_tokenizer_and_back(tmp_path: Path) -> None:
    """`hf:FOLDER` from documents to a PNG file; the model's folder is not needed any more then."""
    model = save_model("JanusVQVAE", tmp_path / "model")
    save_picture(tmp_path / "in/one.png", 1, size=16, channels=3)
    content = [{"type": "text", "text": "<boi>a picture</s>"}, {"type": "image", "path": "one.png"}]
    documents = write_jsonl(tmp_path / "in/docs.jsonl", [{"id": "a", "content": content}])
    settings = config(
        vocab={"text": 300, "image": 64},
        documents=[str(documents)],
        image={"kind": f"hf:{model}", "size": 16, "channels": 3},
        held_out=0,
    )
    manifest = prepare(settings, tmp_path / "out", progress=False)
    shutil.rmtree(model)
    tokenizer = load_image_tokenizer(tmp_path / "out" / "image_tokenizer")
    assert manifest.image_tokenizer == tokenizer.fingerprint() and manifest.tokens_per_image == 64
    found = draw_sample(tmp_path / "out", 0, tmp_path / "pictures")
    assert found["content"][0]["text"] == "<boi>a picture</s>"  # text, and no marks
    (file,) = found["images"]
    codes = tokenizer.encode(picture(1, size=16, channels=3)[None])
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), tokenizer.decode(codes)[0])


def test_a_held_out_document_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--held-out` selects the split, `--sample` the document: neither is dropped for the other."""
    save_picture(tmp_path / "1.png", 1)
    words = [("learned", "train"), ("kept away", "validation")]
    records = [{"id": side, "content": [image("1.png"), text(said)], "split": side} for said, side in words]
    settings = config(documents=[str(write_jsonl(tmp_path / "d.jsonl", records))])
    prepare(settings, tmp_path / "out", progress=False)
    asked = ["data", "inspect", str(tmp_path / "out"), "--held-out", "--out", str(tmp_path / "drawn")]
    assert main([*asked, "--sample", "0"]) == 0
    said = capsys.readouterr().out
    assert "kept away" in said and "learned" not in said
    assert (tmp_path / "drawn/validation-0-sheet.png").is_file()
    assert main(asked) == 0
    assert capsys.readouterr().out.count("kept away") == 1
