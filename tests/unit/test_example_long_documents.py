"""examples/long_documents: what the documents say, how long they are, and which questions are measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config.load import load
from mmscale.data.modalities.text_tokens import TextTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples/long_documents"
LENGTH = 90


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    spec = importlib.util.spec_from_file_location(f"long_documents_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, EXAMPLE / "write_documents.py", folder, "--length", str(LENGTH), "--documents", "5"]
    subprocess.run([*command, "--held-out", "2", *arguments], check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]


def split(word: str) -> tuple[str, str]:
    """A key and its number; a key has four letters."""
    return word[:4], word[4:]


@pytest.mark.parametrize("pictures", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_documents_say(pictures: bool, tmp_path: Path) -> None:
    more = ("--keys", "8", "--times", "2", *(["--pictures"] if pictures else []))
    documents = written(tmp_path / "one", *more)
    assert documents == written(tmp_path / "other", *more)
    assert [one["split"] for one in documents] == ["train"] * 5 + ["validation"] * 2
    tokenizer = TextTokenizer.load(tmp_path / "one" / "tokenizer.json")
    for document in documents:
        named: dict[str, str] = {}
        asked: list[str] = []
        tokens, key = 2, ""
        for piece in document["content"]:
            if piece["type"] == "image":
                assert (tmp_path / "one" / piece["path"]).is_file()
                named[key] = "a picture"
                tokens += 6
                continue
            ids = tokenizer.encode(piece["text"])
            assert tokenizer.unknown not in ids.tolist()
            tokens += len(ids)
            words = iter(piece["text"].split())
            for word in words:
                if word == "?":
                    key, number = next(words), next(words)
                    assert named[key] in (number, "a picture")
                    asked.append(key)
                elif word != ".":
                    key, number = (word, "") if pictures else split(word)
                    assert key not in named
                    named[key] = number
        assert tokens == LENGTH
        assert sorted(asked) == sorted([*named, *named])


def test_which_questions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question once, with its distances from where its key was named, and where it stood last."""
    measure = example("measure", monkeypatch)
    vocabulary = {"one": 11, "two": 12, "bado": 20, "kifu": 21, "badoone": 30, "badotwo": 31, "kifuone": 32}
    named = measure.names(vocabulary)
    assert named == {30: 20, 31: 20, 32: 21}
    ask, key, other = 1, 20, 21
    ids = np.array([5, 30, 32, ask, key, 11, 3, 3, ask, key, 11, ask, other, 11, 6])
    assert measure.questions(ids, ask, named) == [(4, 3, 3, 5), (9, 8, 5, 10), (12, 10, 10, 13)]


def test_its_configuration_is_valid() -> None:
    assert load(EXAMPLE / "words.yaml").model.seq_length == 256
    file = EXAMPLE / "long_documents.yaml"
    longer = load(file, ["model.seq_length=8192", "parallel.cp=2", "data.path=data/long-8k"])
    assert load(file).model.seq_length == 1024 and longer.data.prepare is not None
    assert longer.data.prepare.max_document_tokens == longer.model.seq_length
