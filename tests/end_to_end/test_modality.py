"""A modality that the package does not know, in one file and one call of `register`, from documents to an export."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.data.documents import schema
from mmscale.data.modalities import table
from tests.end_to_end.conftest import SETTINGS
from tests.end_to_end.running import Ended, assert_says, mmscale

TOY = '''
import hashlib
import json
from pathlib import Path

import numpy as np


class BeatsCodec:
    kind = "digits"

    def __init__(self, length):
        self.tokens_per_item, self.vocab_size = length, 4

    def encode(self, items):
        return np.asarray(items, np.int64)

    def decode(self, codes):
        return np.asarray(codes, np.int64)

    def fingerprint(self):
        return hashlib.sha256(f"beats {self.tokens_per_item}".encode()).hexdigest()[:16]

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "beats.json").write_text(json.dumps(self.tokens_per_item))


class Beats:
    """Files of digits 0..3."""

    name = "beats"
    suffixes = ("beat",)
    written = ".beat"
    files = ("beats.json",)
    shipped = True

    @staticmethod
    def fit(settings, items, codes, report):
        if set(settings) - {"length"}:
            raise ValueError(f"there is no setting {sorted(settings)[0]!r}")
        return BeatsCodec(settings.get("length", 6)) if any(items.items("train", 1)) else None

    @staticmethod
    def load(folder):
        return BeatsCodec(json.loads((folder / "beats.json").read_text()))

    @staticmethod
    def read(source, codec):
        if isinstance(source, np.ndarray):
            return source
        text = source.decode() if isinstance(source, bytes) else Path(source).read_text()
        if len(text) != codec.tokens_per_item or set(text) - set("0123"):
            raise ValueError(f"{text!r} is not {codec.tokens_per_item} digits 0..3")
        return np.array([int(one) for one in text])

    @staticmethod
    def write(values, file, codec):
        Path(file).write_text("".join(map(str, values.tolist())))

    @staticmethod
    def picture(values, codec):
        return (np.asarray(values, np.uint8)[None, :, None] * 85).astype(np.uint8)

    @staticmethod
    def quality(codec, items):
        return {"codes_used": len(np.unique(items)), "said": "nothing is lost"}
'''
BEATS = ("012301", "333333", "010203")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The modality of a file outside of the package, registered for this module's tests."""
    file = tmp_path_factory.mktemp("toy") / "beats_of_a_test.py"
    file.write_text(TOY)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    before, parsers, suffixes = dict(table.MODALITIES), dict(schema._PARSERS), dict(schema.SUFFIXES)
    yield table.register(module.Beats)
    for kept, now in ((before, table.MODALITIES), (parsers, schema._PARSERS), (suffixes, schema.SUFFIXES)):
        now.clear()
        now.update(kept)  # type: ignore[arg-type]
    del sys.modules[file.stem]


def settings(folder: Path, **prepare: Any) -> dict[str, Any]:
    modalities = [{"name": "text", "size": 384}, {"name": "beats", "size": 8, "marks": True}]
    own = {
        "documents": [str(folder / "documents.jsonl")],
        "held_out": 0.2,
        "workers": 2,
    }
    dense = {"kind": "dense", "experts": {}, "depth": None}
    return {
        **SETTINGS,
        "vocab": {"modalities": modalities, "pad_multiple": 64},
        "data": {"prepare": own | prepare, "path": str(folder / "set")},
        "model": SETTINGS["model"] | dense,
        "train": SETTINGS["train"] | {"steps": 6, "eval_every": 3, "eval_batches": 1},
        "parallel": {},
        "checkpoint": {"every": 0, "asynchronous": False},
        "run": {"name": "beats", "dir": str(folder)},
    }


def did(*arguments: str | Path, timeout_s: float = 400.0) -> Ended:
    ended = mmscale(*arguments, timeout_s=timeout_s)
    assert ended.status == 0, ended
    return ended


@pytest.fixture(scope="module")
def trained(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, their data set `set`, the run `beats` and its export `hf`."""
    folder = tmp_path_factory.mktemp("beats")
    for number, beat in enumerate(BEATS):
        (folder / f"{number}.beat").write_text(beat)
    item = {"type": "beats", "path": "0.beat"}
    documents = []
    for number in range(60):
        own = item | {"path": f"{number % 3}.beat"}
        words = {"type": "text", "text": f"beat number {number % 3}"}
        documents.append({"id": str(number), "content": [words, own] if number % 2 else [own, words]})
    documents.append({"id": "ids", "content": [{"type": "tokens", "modality": "beats", "ids": [3, 2, 1, 0, 1, 2]}]})
    documents.append({"id": "short", "content": [{"type": "tokens", "modality": "beats", "ids": [3, 2]}]})
    (folder / "bad.beat").write_text("9")
    documents.append({"id": "bad", "content": [{"type": "beats", "path": "bad.beat"}]})
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (folder / "beats.yaml").write_text(yaml.safe_dump(settings(folder)))
    did("data", "prepare", folder / "beats.yaml", "--out", folder / "set", "--json")
    did("train", folder / "beats.yaml")
    did("convert", "to-hf", folder / "beats", folder / "hf")
    return folder


def test_data_set(trained: Path) -> None:
    manifest = json.loads((trained / "set" / "manifest.json").read_text())
    assert set(manifest["tokenizers"]) == {"text", "beats"} and manifest["tokens_per_item"] == {"beats": 6}
    reasons = [json.loads(line)["reason"] for line in (trained / "set" / "rejected.jsonl").read_text().splitlines()]
    assert reasons == ["a beats has 2 tokens instead of 6", "beats bad.beat is unreadable: '9' is not 6 digits 0..3"]
    found = json.loads(did("data", "inspect", trained / "set", "--json").out)
    assert found["beats_tokenizer"]["kind"] == "digits" and found["splits"]["train"]["tokens"]["beats"] > 0
    out = trained / "drawn"
    drawn = json.loads(did("data", "inspect", trained / "set", "--sample", "0", "--out", out, "--json").out)
    assert "<begin_beats>[beats 0: 6 tokens]<end_beats>" in drawn["text"]
    (file,) = drawn["files"]["beats"]
    assert Path(file).read_text() in BEATS


def test_losses_by_modality(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "beats" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/beats" in line for line in lines if "loss" in line)
    assert any("eval/loss/beats" in line for line in lines)


@pytest.mark.parametrize("model", ["beats", pytest.param("hf", marks=pytest.mark.long)])
def test_generation(model: str, trained: Path, tmp_path: Path) -> None:
    """An item that is begun is whole, whoever begins it; one that is read has the codes of its file."""
    asked = ("sample", trained / model, "--prompt", "a beat ", "--count", "2", "--out", tmp_path, "--json")
    found = json.loads(did(*asked, "--begin", "beats", "--temperature", "1").out)
    assert len(found["files"]["beats"]) >= 2 and found["sheet"]
    assert all(len(Path(file).read_text()) == 6 for file in found["files"]["beats"])
    for sample in found["samples"]:
        assert "beats" in sample["pieces"][0]
    read = json.loads(did(*asked, "--item", f"beats={trained / '1.beat'}", "--max-tokens", "4").out)
    assert len(read["samples"]) == 2
    ended = mmscale(*asked, "--item", f"beats={trained / 'bad.beat'}")
    assert_says(ended, status=3, cause="'9' is not 6 digits", remedy="another file")
    ended = mmscale(*asked, "--begin", "smell")
    assert_says(ended, status=2, cause="trained without smell", remedy="--begin")


def test_export_carries_the_file(trained: Path) -> None:
    hf = trained / "hf"
    assert (hf / "modality_beats_moma.py").read_text() == TOY
    assert "Beats" in (hf / "codecs_moma.py").read_text() and (hf / "beats_tokenizer" / "beats.json").is_file()
    report = json.loads((hf / "conversion_report.json").read_text())
    assert report["gate"]["passed"] and report["data"]["beats_tokenizer"]
    config = json.loads((hf / "processor_config.json").read_text())
    assert config["marked"] == ["beats"]


def test_another_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained / "set", tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizers"]["beats"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    ended = mmscale("eval", trained / "beats", "--data", other)
    assert_says(ended, status=3, cause=r"the beats tokenizer of .*other \(another\) is another", remedy="tokenizers of")


def test_settings(trained: Path, tmp_path: Path) -> None:
    """Those of the modality are its own; those of others are refused before anything is read."""
    spec = trained / "beats.yaml"
    asked = ("data", "prepare", spec, "--out", tmp_path / "set")
    ended = mmscale(*asked[:3], "--out", tmp_path / "begun", "data.prepare.modalities.beats.tempo=3")
    assert_says(ended, status=2, cause="data.prepare.modalities.beats: there is no setting 'tempo'", remedy="correct")
    ended = mmscale(*asked, "data.prepare.modalities.smell.length=3")
    assert_says(ended, status=2, cause="data.prepare.modalities.smell: no such modality", remedy="marks: true")
    assert not (tmp_path / "set").exists()
    reused = f"data.prepare.modalities.beats.load={trained / 'set' / 'beats_tokenizer'}"
    did(*asked, reused)
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert made["tokenizers"] == json.loads((trained / "set" / "manifest.json").read_text())["tokenizers"]
