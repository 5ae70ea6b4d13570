# mmscale/data/modalities/text_tokens.py: lossless, fits its range, and never lets a user's text open an image.
"""Tests of the text tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from mmscale.data.modalities.text_tokens import FILE, TextTokenizer
from mmscale.data.vocab import BOI, SPECIAL_TOKENS
from mmscale.errors import DataError

CORPUS = ["this is a seven", "draw a seven", "draw an eight", "this is an eight"] * 20


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, size=300)


def test_special_tokens_come_first_and_the_vocabulary_fits(trained: TextTokenizer) -> None:
    assert [trained.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert trained.vocab_size <= 300
    assert TextTokenizer.train(CORPUS, size=270).vocab_size == 270  # filled to the last id
    assert TextTokenizer.train([], size=300).vocab_size == 261  # no merges: special tokens and bytes


def test_frequent_word_is_one_token(trained: TextTokenizer) -> None:
    (seven,) = trained.encode(" seven")
    assert trained.encode("this is a seven")[-1] == seven == trained.encode("draw a seven")[-1]


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = _small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not len(ids) or ids.min() >= len(SPECIAL_TOKENS)


_CACHE: list[TextTokenizer] = []


def _small() -> TextTokenizer:
    if not _CACHE:
        _CACHE.append(TextTokenizer.train(CORPUS, size=280))
    return _CACHE[0]


@pytest.mark.parametrize("text", ["<boi>", "a <boi> b<eoi>", "<s></s><pad>", "<img_5>", "".join(SPECIAL_TOKENS)])
def test_text_never_becomes_a_special_token(trained: TextTokenizer, tmp_path: Path, text: str) -> None:
    trained.save(tmp_path)
    for tokenizer in (trained, TextTokenizer.load(tmp_path / FILE)):  # the flag is not stored in the file
        ids = tokenizer.encode(text)
        assert ids.min() >= len(SPECIAL_TOKENS) and tokenizer.decode(ids) == text


def test_saved_tokenizer_is_the_same(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path / FILE, size=300)
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.encode("draw a seven").tolist() == trained.encode("draw a seven").tolist()
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert TextTokenizer.train(CORPUS, size=300).fingerprint() == trained.fingerprint()
    assert TextTokenizer.train(CORPUS, size=270).fingerprint() != trained.fingerprint()


def test_decoding_leaves_special_tokens_out(trained: TextTokenizer) -> None:
    assert trained.decode([BOI, *trained.encode("seven"), 2]) == "seven"


def foreign(file: Path) -> Tokenizer:
    """A Llama-like tokenizer: its own <s> at id 1, a template that adds it, no <boi>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(file))
    return tokenizer


def test_foreign_tokenizer_is_moved_behind_ours(tmp_path: Path) -> None:
    file = tmp_path / FILE
    theirs = foreign(file)
    ours = TextTokenizer.load(file, size=320)
    text = "draw a seven <s> <boi>"
    expected = theirs.encode("draw a seven", add_special_tokens=False).ids
    assert ours.encode("draw a seven").tolist() == [number + 5 for number in expected]
    assert ours.encode(text).min() >= len(SPECIAL_TOKENS)
    assert ours.vocab_size == theirs.get_vocab_size() + 5
    assert [ours.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    ours.save(tmp_path / "copy")
    assert TextTokenizer.load(tmp_path / "copy" / FILE).fingerprint() == ours.fingerprint()


def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    foreign(tmp_path / FILE)
    with pytest.raises(DataError, match=r"needs \d+ ids with 5 special tokens, the text range has 270"):
        TextTokenizer.load(tmp_path / FILE, size=270)
    with pytest.raises(DataError, match="needs 5 special tokens"):
        TextTokenizer.train(CORPUS, size=260)


def test_unreadable_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / FILE
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer.load(file)
    for content in ("{", "{}", '{"model": {"vocab": {}}}'):
        file.write_text(content)
        with pytest.raises(DataError, match="cannot be read"):
            TextTokenizer.load(file)
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer.save(str(file))
    with pytest.raises(DataError, match="Unigram model, whose ids cannot be moved"):
        TextTokenizer.load(file)


def test_tokenizer_with_special_strings_as_words_is_refused(tmp_path: Path) -> None:
    words = {name: index for index, name in enumerate(SPECIAL_TOKENS)} | {"<unk>": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / FILE))
    assert json.loads((tmp_path / FILE).read_text())["added_tokens"] == []
    with pytest.raises(DataError, match="into special tokens"):
        TextTokenizer.load(tmp_path / FILE)
