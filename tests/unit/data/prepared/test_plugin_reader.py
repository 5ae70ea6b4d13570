"""A reader of another package: its data set is that of the same documents in JSONL, and its faults are named."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from mmscale.config import Config
from mmscale.config import plugins as of_config
from mmscale.config.load import dump, load, resolve
from mmscale.data import digests
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError, MmscaleError
from mmscale.tables.plugins import MissingPluginError
from tests.plugins import NAMED, PACKAGE, install
from tests.unit.test_plugin_checks import SMALL

NUMBER = 30
CSV = NAMED["reader"]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """The same documents as CSV and as JSONL; the fifth picture is missing."""
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = [(f"word number {number}, then a picture", f"{number}.png") for number in range(NUMBER)]
    for number in range(NUMBER):
        if number != 4:
            PIL.Image.new("L", (8, 8), number * 8).save(folder / f"{number}.png")
    with (folder / "captions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "picture"), *rows])
    lines = []
    for number, (text, image) in enumerate(rows, start=1):
        content = [{"type": "text", "text": text}, {"type": "image", "path": image}]
        lines.append(json.dumps({"id": f"captions.csv:{number}", "content": content}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def config(file: Path, *overrides: str) -> Config:
    prepared = {
        "documents": [str(file)],
        "image": {"size": 8, "channels": 1, "patch": 4},
        "part_documents": 8,
        "workers": 1,
        "held_out": 0.2,
    }
    vocab = {"modalities": [{"name": "text", "size": 384}, {"name": "image", "size": 16}], "pad_multiple": 64}
    return resolve({**SMALL, "vocab": vocab, "data": {"prepare": prepared}}, overrides)


def csv_config(folder: Path, *overrides: str, by: int = 0) -> Config:
    named = (f"data.prepare.reader={CSV[by]}", "data.prepare.reader_args.image=picture")
    return config(folder / "captions.csv", *named, *overrides)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("by", [0, 1], ids=["path", "entry point"])
def test_the_set_is_that_of_the_same_documents(
    by: int, workers: int, documents: Path, installed: None, tmp_path: Path
) -> None:
    """In several parts, each read from the middle of the file; worker processes find the package too."""
    ours = prepare(csv_config(documents, by=by), tmp_path / "csv", workers=workers, progress=False)
    theirs = prepare(config(documents / "captions.jsonl"), tmp_path / "jsonl", progress=False)
    assert ours.splits == theirs.splits and ours.tokenizers == theirs.tokenizers and ours.rejected == 1
    assert len(ours.splits["train"].parts) == 4
    written = [digests.read(tmp_path / name) for name in ("csv", "jsonl")]
    assert {name: value for name, value in written[0].items() if name.endswith(".bin")} == {
        name: value for name, value in written[1].items() if name.endswith(".bin")
    }
    reasons = [json.loads(line) for line in (tmp_path / "csv" / "rejected.jsonl").read_text().splitlines()]
    assert [one["where"] for one in reasons] == ["captions.csv:5"] and "4.png is missing" in reasons[0]["reason"]


def test_the_set_remembers_its_reader(documents: Path, installed: None, tmp_path: Path) -> None:
    """The same settings find the set ready; another argument makes another set."""
    out = tmp_path / "set"
    made = prepare(csv_config(documents), out, progress=False)
    settings = json.loads((out / "source.json").read_text())["settings"]
    assert settings["reader"] == CSV[0] and settings["reader_args"] == {"image": "picture"}
    assert prepare(csv_config(documents), out, progress=False) == made
    with pytest.raises(DataError, match=r"was prepared from something else .*reader_args"):
        prepare(csv_config(documents, "data.prepare.reader_args.text=picture"), out, progress=False)


def test_only_preparing_needs_the_package(documents: Path, tmp_path: Path) -> None:
    prepared = csv_config(documents)
    of_config.check(prepared)  # what training asks for
    file = tmp_path / "config.yaml"
    file.write_text(dump(prepared))
    assert load(file) == prepared
    with pytest.raises(MissingPluginError, match=r"data\.prepare\.reader: there is no module moma_plugins here"):
        prepare(prepared, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def count(self, file): 1 / 0", "broken:Reader cannot read .*captions.csv: ZeroDivisionError"),
        ("def count(self, file): return 'many'", "counts 'many' records in"),
        ("def count(self, file): return 3", "gives 2 records of .* from 0 on, instead of 3"),
        ("def count(self, file): return 1", "gives 2 records of .* from 0 on, instead of 1"),
        ("pass", "makes an object without count"),
        (
            "def count(self, file): return 2\n    def read(self, file, first, count): raise KeyError('text')",
            "broken:Reader cannot read .*captions.csv: KeyError: 'text'",
        ),
    ],
)
def test_faults_of_a_reader(
    code: str, words: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "class Reader:\n    def read(self, file, first, count):\n"
        f"        return [{{'content': [{{'type': 'text', 'text': str(n)}}]}} for n in range(2)]\n    {code}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    broken = config(documents / "captions.csv", "data.prepare.reader=broken:Reader")
    with pytest.raises(MmscaleError, match=words) as caught:
        prepare(broken, tmp_path / "set", progress=False)
    assert "\n" not in caught.value.cause and caught.value.remedy
    assert not (tmp_path / "set" / "manifest.json").exists()
