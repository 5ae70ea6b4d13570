"""Tokenizers of another package: a data set holds what they made, and their faults are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.config import plugins as of_config
from mmscale.data import digests
from mmscale.data.modalities import table
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.inspect_set import draw_sample
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError, MmscaleError
from mmscale.tables.plugins import MissingPluginError, PluginError
from tests.plugins import NAMED, PACKAGE, install
from tests.unit.data.samples import config as configured
from tests.unit.data.samples import picture, save_picture

NUMBER = 24
SIZES = {"text": 300, "image": 8}
IMAGE = {"size": 8, "channels": 3, "kind_args": {"patch": 2}}


@pytest.fixture
def documents(tmp_path: Path) -> str:
    lines = []
    for number in range(NUMBER):
        save_picture(tmp_path / f"{number}.png", number, size=8, channels=3)
        content = [{"type": "text", "text": f"number {number * 111}"}, {"type": "image", "path": f"{number}.png"}]
        lines.append(json.dumps({"id": str(number), "content": content}) + "\n")
    (tmp_path / "documents.jsonl").write_text("".join(lines))
    return str(tmp_path / "documents.jsonl")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def plugged(documents: str, *, by: int = 0, image: str | None = None, patch: int = 2) -> Config:
    """by: 0, import path; 1, entry point."""
    kind = NAMED["image_tokenizer"][by] if image is None else image
    args = {"patch": patch} if image is None else {}
    return configured(
        vocab=SIZES,
        documents=[documents],
        image={**IMAGE, "kind": kind, "kind_args": args},
        text={"kind": NAMED["text_tokenizer"][by]},
        part_documents=8,
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("by", [0, 1], ids=["path", "entry point"])
def test_documents_come_back(by: int, workers: int, documents: str, installed: None, tmp_path: Path) -> None:
    """Prepared in several parts and processes, opened again, drawn: the plug-ins' own codes and ids."""
    out = tmp_path / "set"
    manifest = prepare(plugged(documents, by=by), out, workers=workers, progress=False)
    image, text = table.open_codecs(out)["image"], open_text_tokenizer(out)
    assert manifest.rejected == 0 and manifest.tokenizers == {"text": text.fingerprint(), "image": image.fingerprint()}
    assert (image.kind, image.vocab_size, image.tokens_per_item) == (NAMED["image_tokenizer"][by], 8, 16)
    pixels = picture(3, size=8, channels=3)[None]
    drawn = image.decode(image.encode(pixels))
    assert drawn.shape == pixels.shape and len(np.unique(drawn)) > 2
    assert [text.decode([number]) for number in text.encode("7777")] == ["7", "7", "7", "7"]
    assert text.decode(text.encode("number 42")) == "number 42"
    found = draw_sample(out, 0, tmp_path / "drawn")
    assert "number" in found["text"] and len(found["images"]) == 1


def test_the_set_remembers_its_tokenizers(documents: str, installed: None, tmp_path: Path) -> None:
    """The same settings find the set ready; another argument makes another set; a built-in set is as before."""
    out = tmp_path / "set"
    made = prepare(plugged(documents), out, progress=False)
    settings = json.loads((out / "source.json").read_text())["settings"]
    assert settings["image"]["kind"] == NAMED["image_tokenizer"][0]
    assert settings["image"]["kind_args"] == {"patch": 2} and settings["text"]["kind"] == NAMED["text_tokenizer"][0]
    before = digests.read(out)
    assert prepare(plugged(documents), out, progress=False) == made and digests.read(out) == before
    with pytest.raises(DataError, match=r"was prepared from something else"):
        prepare(plugged(documents, patch=4), out, progress=False)
    plain = configured(vocab=SIZES, documents=[documents], image={"kind": "levels", "size": 4, "channels": 1})
    prepare(plain, tmp_path / "plain", progress=False)
    settings = json.loads((tmp_path / "plain" / "source.json").read_text())["settings"]
    assert "kind" not in settings["text"] and "kind_args" not in settings["text"] | settings["image"]


def test_what_needs_the_package(
    documents: str, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training does not; encoding and drawing images do, and say what is missing. Text never does."""
    given = plugged(documents)
    prepare(given, tmp_path / "set", progress=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    monkeypatch.undo()
    of_config.check(given)  # what training asks for
    assert open_text_tokenizer(tmp_path / "set").encode("7").size == 1
    with pytest.raises(MissingPluginError, match=r"there is no module moma_plugins here"):
        table.open_codecs(tmp_path / "set")
    with pytest.raises(MissingPluginError, match=r"data\.prepare\..*\.kind: there is no module moma_plugins here"):
        prepare(given, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()


_GOOD = """
import numpy as np
from mmscale.extend import ImageCodes
class Tokens(ImageCodes):
    grid, vocab_size = (1, 1), 4
    def fit(self, images, codes): list(images)
    def encode(self, images): return np.zeros((len(images), 1), np.int64)
    def decode(self, codes): return np.zeros((len(codes), 8, 8, 3), np.uint8)
    def save(self, folder): pass
    def load(self, folder): pass
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("    def fit(self, images, codes): 1 / 0", "broken:Tokens cannot be fitted: ZeroDivisionError"),
        ("    def fit(self, images, codes): self.vocab_size = codes + 1", "has 9 codes, vocab.modalities has 8 ids"),
        ("    def encode(self, images): raise KeyError('x')", "broken:Tokens cannot encode images: KeyError"),
        ("    def encode(self, images): return np.full((len(images), 1), 4)", "wants whole numbers below 4"),
        ("    def encode(self, images): return np.zeros((len(images), 2), int)", "wants whole numbers below 4"),
        ("    def encode(self, images): return np.zeros((len(images), 1))", "encodes to float64"),
        ("    def save(self, folder): raise ValueError('no')", "broken:Tokens cannot be saved: ValueError: no"),
        ("Tokens = dict", "is not a subclass of mmscale.extend.ImageCodes"),
    ],
)
def test_faults_of_an_image_tokenizer(
    code: str, words: str, documents: str, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(f"{_GOOD}{code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(MmscaleError, match=words) as caught:
        prepare(plugged(documents, image="broken:Tokens"), tmp_path / "set", progress=False)
    assert "\n" not in caught.value.cause and caught.value.remedy
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no memory')", "cannot be trained: RuntimeError: no memory"),
        ("return 'a tokenizer'", "makes a str, not a tokenizers.Tokenizer"),
        (
            "from tokenizers import Tokenizer, models; "
            "return Tokenizer(models.WordLevel({str(n): n for n in range(400)}, unk_token='0'))",
            "needs 405 ids .* the text range has 300",
        ),
    ],
)
def test_faults_of_a_text_tokenizer(
    code: str, words: str, documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.py").write_text(
        f"class Words:\n    def __init__(self, ids): pass\n    def train(self, texts):\n        {code}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "words", raising=False)
    given = configured(vocab=SIZES, documents=[documents], image=IMAGE | {"kind": "levels", "kind_args": {}})
    given = given.model_copy(update={"data": given.data.model_copy(update={"prepare": _with_text(given)})})
    with pytest.raises(DataError, match=words) as caught:
        prepare(given, tmp_path / "set", progress=False)
    assert "\n" not in caught.value.cause and caught.value.remedy


def _with_text(given: Config) -> object:
    assert given.data.prepare is not None
    text = given.data.prepare.text.model_copy(update={"kind": "words:Words"})
    return given.data.prepare.model_copy(update={"text": text})


def test_a_data_set_calls_no_other_function(documents: str, installed: None, tmp_path: Path) -> None:
    """A data set from elsewhere may name anything in its settings: only image tokenizers are called."""
    prepare(plugged(documents), tmp_path / "set", progress=False)
    file = tmp_path / "set" / "image_tokenizer" / "image_tokenizer.json"
    settings = json.loads(file.read_text())
    for kind in ("os:system", "subprocess:Popen", "pathlib:Path"):
        file.write_text(json.dumps(settings | {"kind": kind, "args": {}}))
        with pytest.raises(PluginError, match="is not a subclass of"):
            table.open_codecs(tmp_path / "set")
    file.write_text(json.dumps(settings | {"size": "touch /tmp/x"}))
    with pytest.raises(DataError, match="is damaged"):
        table.open_codecs(tmp_path / "set")
