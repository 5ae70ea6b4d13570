# mmscale/data/prepared/reuse.py and `data prepare --like`: a second data set with the first one's tokenizers.
"""Tests of preparing a second source for a blend."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mmscale import bounded
from mmscale.cli import main
from mmscale.config.load import load
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.stream.checks import check_data
from mmscale.errors import DataError
from tests.unit.data.samples import corpus, save_picture, text, write_jsonl

SPEC = """
vocab: {{modalities: [{{name: text, size: 300}}, {{name: image, size: 16}}]}}
model: {{kind: dense, num_layers: 1, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 1, seq_length: 64}}
data:
  {data}
  prepare: {{documents: [{documents}], image: {image}, held_out: 0.25, workers: 1}}
"""
KINDS = {
    "kmeans": "{kind: kmeans, size: 4, channels: 1, patch: 2}",
    "two codebooks": "{kind: kmeans, size: 4, channels: 1, patch: 2, residual: 6}",
    "levels": "{kind: levels, size: 4, channels: 1}",
}


def other_documents(folder: Path) -> Path:
    """Other pictures and words than `corpus`, so that tokenizers fitted to them are others."""
    records = []
    for number in range(30):
        save_picture(folder / f"img/{number}.png", 100 + number)
        words = text(f"something else entirely {number} something else")
        records.append({"id": f"e{number}", "content": [words, {"type": "image", "path": f"img/{number}.png"}]})
    return write_jsonl(folder / "docs.jsonl", records)


def spec(folder: Path, name: str, documents: Path, *, image: str = KINDS["kmeans"], data: str = "cache: null") -> str:
    file = folder / f"{name}.yaml"
    file.write_text(SPEC.format(documents=documents, image=image, data=data))
    return str(file)


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS)
def test_like_reuses_tokenizers_and_vocabulary(tmp_path: Path, image: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert (
        main(["data", "prepare", spec(tmp_path, "a", corpus(tmp_path / "in", 40), image=image), "--out", str(one)]) == 0
    )
    documents = str(other_documents(tmp_path / "in2"))
    assert main(["data", "prepare", "--documents", documents, "--like", str(one), "--out", str(two)]) == 0
    first, second = read_manifest(one), read_manifest(two)
    assert second.tokenizers == first.tokenizers
    assert (second.vocabulary, second.tokens_per_image) == (first.vocabulary, first.tokens_per_image)


@pytest.fixture
def blend(tmp_path: Path) -> dict[str, Any]:
    """One source that is prepared, and a command that prepares the second as part of the same blend."""
    one, two = tmp_path / "one", tmp_path / "two"
    data = f"blend: [{{path: {one}}}, {{path: {two}}}]"
    first = spec(tmp_path, "a", corpus(tmp_path / "in", 40), data=data)
    assert main(["data", "prepare", first, "--out", str(one)]) == 0
    second = spec(tmp_path, "b", other_documents(tmp_path / "in2"), data=data)
    return {"one": one, "two": two, "command": ["data", "prepare", second, "--out", str(two)], "config": second}


def added(remedy: str) -> list[str]:
    """What a remedy's quoted options add to a command."""
    found = re.search(r"`(--like [^`]*)`", remedy)
    assert found, remedy
    return shlex.split(found[1])


def test_other_tokenizers_are_refused_before_anything_is_fitted(
    blend: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(blend["command"]) == 3
    said = capsys.readouterr().err
    assert "would get a text tokenizer and an image tokenizer of its own" in said
    assert not blend["two"].exists()
    assert main([*blend["command"], *added(said)]) == 0
    assert read_manifest(blend["two"]).tokenizers == read_manifest(blend["one"]).tokenizers
    assert main([*blend["command"], *added(said)]) == 0  # again: it is there


def test_the_remedy_of_training_works_as_printed(
    blend: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second set was prepared before the blend was written."""
    alone = spec(tmp_path, "c", tmp_path / "in2/docs.jsonl")
    command = ["data", "prepare", alone, "--out", str(blend["two"])]
    assert main(command) == 0
    train = ["train", blend["config"], "train.steps=1", f"run.dir={tmp_path / 'runs'}"]
    capsys.readouterr()
    assert main(train) == 3
    said = capsys.readouterr().err
    assert f"--like {blend['one']} --overwrite" in said
    assert main([*command, *added(said)]) == 0
    assert read_manifest(blend["two"]).tokenizers == read_manifest(blend["one"]).tokenizers


def test_a_set_outside_the_blend_gets_a_note(
    tmp_path: Path, blend: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    alone = spec(tmp_path, "d", tmp_path / "in2/docs.jsonl", data=f"path: {blend['one']}")
    assert main(["data", "prepare", alone, "--out", str(tmp_path / "three")]) == 0
    assert f"add --like {blend['one']}" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "noted"), [([], True), (["--like"], False)], ids=["own tokenizers", "--like"])
def test_a_set_beside_another_gets_a_note_without_a_configuration(
    tmp_path: Path, blend: dict[str, Any], capsys: pytest.CaptureFixture[str], more: list[str], noted: bool
) -> None:
    """`data prepare --documents FILE` names the data sets of no run; the note comes before anything is fitted."""
    capsys.readouterr()
    alone = spec(tmp_path, "d", tmp_path / "in2/docs.jsonl")
    like = [*more, *[str(blend["one"])] * len(more)]
    assert main(["data", "prepare", alone, "--out", str(blend["one"].with_name("three")), *like]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert (f"add --like {blend['one']}" in lines[0]) == noted, lines


def test_another_vocabulary_is_refused(
    tmp_path: Path, blend: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*blend["command"], "vocab.modalities=[{name: text, size: 310}, {name: image, size: 16}]"]
    assert main([*command, "--like", str(blend["one"])]) == 3
    assert "its vocabulary is 300 text + 16 image, the configuration's 310 text + 16 image" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["data.blend", "data.validation"])
def test_a_second_set_that_is_missing_has_a_remedy_that_works_as_printed(
    tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new set needs the tokenizers of the first: without `--like`, its own would be fitted, and then refused."""
    monkeypatch.chdir(tmp_path)
    one, documents = tmp_path / "one", other_documents(tmp_path / "in2")
    assert main(["data", "prepare", spec(tmp_path, "a", corpus(tmp_path / "in", 40)), "--out", str(one)]) == 0
    both = "blend: [{path: one}, {path: two}]" if named == "data.blend" else "path: one\n  validation: {two: two}"
    made = load(Path(spec(tmp_path, "b", documents, data=both)))
    with pytest.raises(DataError, match="there is no folder two") as refused:
        check_data(made)
    remedy = refused.value.remedy or ""
    assert remedy.endswith(f"or correct {named}" + (".two" if named == "data.validation" else "")), remedy
    found = re.search("run `mmscale ([^`]*)`", remedy)
    assert found, remedy
    assert main(shlex.split(found[1].replace("FILE", str(documents)))) == 0
    check_data(made)


@pytest.mark.parametrize(
    ("given", "more", "share"),
    [("nothing", (), 0.25), ("an override", ("data.prepare.held_out=0.5",), 0.5), ("a specification", (), 0.4)],
)
def test_like_holds_out_the_same_groups(given: str, more: tuple[str, ...], share: float, tmp_path: Path) -> None:
    """With the default share documents of groups that the first set holds out would be trained on."""
    one, two = tmp_path / "one", tmp_path / "two"
    documents = corpus(tmp_path / "in", 40)
    assert main(["data", "prepare", spec(tmp_path, "a", documents), "--out", str(one)]) == 0
    named = ["--documents", str(documents)]
    if given == "a specification":
        file = Path(spec(tmp_path, "b", documents))
        file.write_text(file.read_text().replace("held_out: 0.25", "held_out: 0.4"))
        named = [str(file)]
    assert main(["data", "prepare", *named, *more, "--like", str(one), "--out", str(two)]) == 0
    assert bounded.read_object(two / "source.json")["settings"]["held_out"] == share
    counts = [{name: split.documents for name, split in read_manifest(folder).splits.items()} for folder in (one, two)]
    assert (counts[0] == counts[1]) is (share == 0.25)
