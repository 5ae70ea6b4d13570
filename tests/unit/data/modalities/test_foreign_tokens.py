# mmscale/data/modalities/foreign_tokens.py: a .tiktoken file gives the ids that tiktoken gives.
"""Tests of tokenizers of other programs."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from mmscale.data.modalities import foreign_tokens
from mmscale.data.modalities.foreign_tokens import PATTERN, converted
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.errors import DataError

TEXTS = ["the theatre there then", "  draw\n\na  seven's 1234567", "naïve 東京 🙂", "they'll x=1;\t\r\n", "aaaaaaa"]


def ranks() -> dict[bytes, int]:
    """All bytes in an order of their own, as in cl100k_base, and joined ones."""
    single = [bytes([byte]) for byte in (*range(33, 256), *range(33))]
    joined = [b"th", b"the", b" the", b"re", b"th" + b"e" + b"re", b"aa", b"aaa", b"aaaa", "ï".encode(), b" s", b"12"]
    return {token: rank for rank, token in enumerate([*single, *joined])}


def written(file: Path, content: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in content.items()]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def test_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    ours = TextTokenizer.load(written(tmp_path / "x.tiktoken", ranks()), size=300)
    for text in TEXTS:
        assert ours.encode(text).tolist() == [number + 5 for number in theirs.encode(text)]


def test_a_file_becomes_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(written(tmp_path / "x.tiktoken", ranks()), size=300)
    assert tokenizer.vocab_size == 5 + len(ranks())
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" the")[0] == 5 + ranks()[b" the"]
    tokenizer.save(tmp_path / "copy")
    again = TextTokenizer.load(tmp_path / "copy/tokenizer.json")
    assert all((again.encode(text) == tokenizer.encode(text)).all() for text in TEXTS)


def test_a_conversion_with_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check would be worth nothing if it could not fail."""
    file = written(tmp_path / "x.tiktoken", ranks())
    monkeypatch.setattr(foreign_tokens, "_SAMPLE", TEXTS)
    converted(file)
    monkeypatch.setattr(foreign_tokens, "_joined", lambda token, ranks, *, below: None)  # no merges
    with pytest.raises(DataError, match="has other tokens than its ranks give"):
        converted(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no base64! 1\n", "cannot be read"),
        (b"YQ==\n", "cannot be read"),
        (b"YQ== 0\nYg== 0\n", "a rank twice"),
        (b"YQ== 0\n", "has no token for byte 0"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=said):
        TextTokenizer.load(tmp_path / "x.tiktoken")
