"""Settings that no tokenizer can be made with are refused before a document is read, of every modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.config.load import resolve
from mmscale.data.modalities import text_tokens
from mmscale.data.modalities.image import ImageModality
from mmscale.data.modalities.image_settings import SETTINGS
from mmscale.data.modalities.image_tokens import LevelsTokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.prepared.prepare import plan_shares, prepare
from mmscale.errors import MmscaleError
from tests.unit.data.samples import image, save_picture, text, write_jsonl

MODEL = {"kind": "dense", "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1}
AUDIO = {"name": "audio", "size": 16, "marks": True}
# Settings of data.prepare, and a word of the message. HERE is a folder with a `levels` tokenizer for pictures of 4 x 4.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "audio, an unknown key": ({"modalities": {"audio": {"bnads": 8}}}, "there is no setting 'bnads'"),
    "audio, a value": ({"modalities": {"audio": {"rate": 7}}}, "rate is 7"),
    "audio, two that exclude each other": ({"modalities": {"audio": {"load": "x", "rate": 8000}}}, "load is given"),
    "audio, no folder": ({"modalities": {"audio": {"load": "HERE/none"}}}, "audio.load: there is no"),
    "image, in the wrong place": ({"modalities": {"image": {"size": 4}}}, "data.prepare.modalities.image"),
    "image, no folder": (
        {"image": {"kind": "kmeans", "size": 4, "patch": 2, "path": "HERE/none"}},
        "image.path: there is no",
    ),
    "image, another size": ({"image": {"kind": "levels", "size": 8, "channels": 1, "path": "HERE"}}, "size 4"),
    "image, too many codes": ({"image": {"kind": "levels", "size": 4, "channels": 1, "path": "HERE"}}, "17 codes"),
    "image, no model": ({"image": {"kind": "vq", "path": "HERE/large"}}, "no model folder"),
    "text, two that exclude each other": ({"text": {"kind": "bytes", "load": "x"}}, "load names a tokenizer"),
    "text, no file": ({"text": {"load": "HERE/none.json"}}, "text.load: there is no"),
    "text, too many ids": ({"text": {"load": "HERE/large/tokenizer.json"}}, "the text range has"),
    "questions": ({"tasks": {"which": "HERE/questions.jsonl"}}, "questions.jsonl:1"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    LevelsTokenizer(4, 1, 17).save(folder)
    assert (folder / SETTINGS).is_file()
    TextTokenizer.train([f"word{n} word{n}" for n in range(500)], size=400).save(folder / "large")
    assert (folder / "large" / text_tokens.FILE).is_file()
    (folder / "questions.jsonl").write_text('{"id": "1", "content": []}\n')
    save_picture(folder / "0.png", 0)
    write_jsonl(folder / "d.jsonl", [{"id": "1", "content": [text("a word"), image("0.png")]}])
    return folder


def placed(value: Any, here: Path) -> Any:
    """The settings with the folder in place of HERE."""
    if isinstance(value, dict):
        return {key: placed(own, here) for key, own in value.items()}
    return value.replace("HERE", str(here)) if isinstance(value, str) else value


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("what", WRONG)
def test_before_a_document_is_read(what: str, shared: bool, here: Path, tmp_path: Path) -> None:
    """A folder that was begun would have to be removed, and reading takes minutes."""
    wrong, said = WRONG[what]
    size = {"image": {"kind": "levels", "size": 4, "channels": 1}}
    settings = {"documents": [str(here / "d.jsonl")], "workers": 1} | size | placed(wrong, here)
    vocabulary = [{"name": "text", "size": 320}, {"name": "image", "size": 16}, AUDIO]
    config = resolve({"model": MODEL, "vocab": {"modalities": vocabulary}, "data": {"prepare": settings}}, [])
    out = tmp_path / "out"
    with pytest.raises(MmscaleError) as caught:
        plan_shares(config, out, number=2, progress=False) if shared else prepare(config, out, progress=False)
    assert said in caught.value.cause and caught.value.remedy
    assert not out.exists()


def test_a_modality_need_not_check(monkeypatch: pytest.MonkeyPatch, here: Path, tmp_path: Path) -> None:
    """Of those that are no part of the package, older ones have no method for it."""
    monkeypatch.delattr(ImageModality, "check")
    settings = {"documents": [str(here / "d.jsonl")], "image": {"kind": "levels", "size": 4, "channels": 1}}
    vocabulary = [{"name": "text", "size": 320}, {"name": "image", "size": 16}]
    config = resolve({"model": MODEL, "vocab": {"modalities": vocabulary}, "data": {"prepare": settings}}, [])
    assert prepare(config, tmp_path / "out", progress=False).tokenizers["image"]
