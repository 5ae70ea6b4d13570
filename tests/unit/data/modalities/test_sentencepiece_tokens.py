"""A .model file of sentencepiece gives the ids that sentencepiece gives, or is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mmscale.data.modalities import sentencepiece_tokens
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from tests.unit.data.samples import config

WORDS = ["theatre", "there", "then", "seven's", "draw", "naïve", "red", "bus", "buses", "1234567", "x=1;", "東京"]
TEXTS = [
    "the theatre there then",
    "  draw   a  seven's 1234567 ",
    "naïve 東京 🙂 unseen: ß",
    "they'll x=1;\t\r\n",
    "<s></s><unk> <0x41>",
    "bus",
    "",
]


def trained(folder: Path, **settings: Any) -> Path:
    """A small model."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install 'mmscale[sentencepiece]'")
    lines = [" ".join(WORDS[(start + 5 * place) % len(WORDS)] for place in range(9)) for start in range(400)]
    options = {"vocab_size": 360, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "x"), hard_vocab_limit=False, **options
    )
    return folder / "x.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [
        {},  # spaces are joined, texts are normalized by NFKC
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # as Llama 2
        {"add_dummy_prefix": False, "byte_fallback": False, "vocab_size": 100},
        {"unk_id": 2, "bos_id": 0, "eos_id": 1, "pad_id": 3},
    ],
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    file = trained(tmp_path, **settings, model_type=kind)
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = TextTokenizer.load(file, size=400)
    shift = ours.vocab_size - theirs.get_piece_size()
    assert shift == 5
    for text in TEXTS:
        assert ours.encode(text).tolist() == [number + shift for number in theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)).replace(" ⁇ ", "<unk>")
    assert ours.unknown == theirs.unk_id() + shift
    ours.save(tmp_path / "saved")
    again = TextTokenizer.load(tmp_path / "saved" / "tokenizer.json")
    assert again.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_large_model_gives_the_same_ids_everywhere(tmp_path: Path, kind: str) -> None:
    """On random texts of letters, signs and names of special tokens, with pieces that contain "<" and unknown ones."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install 'mmscale[sentencepiece]'")
    random = np.random.default_rng(0)
    parts = ["<s>", "</s>", "<boi>", "<unk>", "<0x41>", "a<b", "if (x<y)", "ß", "東", *WORDS]
    words = ["".join(random.choice(list("abcdefg<"), random.integers(2, 7))) for _ in range(80)]
    lines = [" ".join(random.choice([*parts[5:], *words], 8)) for _ in range(600)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "x"), vocab_size=110, model_type=kind, minloglevel=2
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x.model"))
    ours = TextTokenizer.load(tmp_path / "x.model")
    same: list[bool] = []
    for _ in range(500):
        text = "".join(random.choice([*parts, *words, " ", "<", "q", "🙂"], random.integers(1, 12)))
        found, wanted = (ours.encode(text) - 5).tolist(), theirs.encode(text)
        same.append(found == wanted)
        if kind == "unigram":  # where two ways to cut a text are equally probable, sentencepiece's rounding decides
            assert sum(map(theirs.get_score, found)) == pytest.approx(sum(map(theirs.get_score, wanted)), rel=1e-6), (
                text
            )
        else:
            assert same[-1], text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)).replace(" ⁇ ", "<unk>")
    assert np.mean(same) > 0.8


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_an_export_has_the_same_tokens(tmp_path: Path, kind: str) -> None:
    from checkpoints_tools.huggingface.fast_tokenizer import fast_tokenizer

    ours = TextTokenizer.load(trained(tmp_path, model_type=kind))
    given = config(vocab={"text": ours.vocab_size + 3, "image": 16})
    vocabulary = Vocabulary.from_config(given.vocab)
    theirs = fast_tokenizer(ours, vocabulary, rows=512, context=64)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
    assert theirs.convert_tokens_to_ids("<image_0>") == vocabulary.range_of("image")[0]


def test_other_unigram_files_are_refused(tmp_path: Path) -> None:
    """A tokenizer.json of another program, whose text could contain the names of special tokens."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="is a Unigram model, whose ids cannot be moved") as error:
        TextTokenizer.load(tmp_path / "tokenizer.json")
    assert ".model file of sentencepiece" in error.value.remedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "char"}, "is a Char model, not BPE or Unigram"),
        ({"user_defined_symbols": ["bus"]}, "has user-defined pieces"),
        ({"treat_whitespace_as_suffix": True}, "spaces end words"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        TextTokenizer.load(trained(tmp_path, **settings))
    assert "cannot be converted exactly" in error.value.cause and "tokenizer.json" in error.value.remedy


def test_a_conversion_that_gives_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = trained(tmp_path)
    monkeypatch.setattr(sentencepiece_tokens, "_merges", lambda model: iter(()))
    with pytest.raises(DataError, match="has other tokens than sentencepiece gives"):
        TextTokenizer.load(file)


def test_only_equally_probable_cuts_are_the_same() -> None:
    from types import SimpleNamespace

    scores = {0: (-2.0, 1), 1: (-3.5, 1), 2: (0.0, 2), 3: (-5.5, 1), 4: (-5.5001, 1)}
    model = SimpleNamespace(pieces=[SimpleNamespace(score=score, type=kind) for score, kind in scores.values()])
    assert sentencepiece_tokens._tied(model, [0, 1], [1, 0]) and sentencepiece_tokens._tied(model, [0, 1], [3])
    assert not sentencepiece_tokens._tied(model, [0, 1], [4])
    assert not sentencepiece_tokens._tied(model, [0, 1, 2], [0, 1]), "unknown characters are not the same number"


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 40, b"{}"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("sentencepiece", reason="pip install 'mmscale[sentencepiece]'")
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.model cannot be read"):
        TextTokenizer.load(tmp_path / "x.model")


def test_without_the_package_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.model").write_bytes(b"\x0a\x00")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="needs the packages sentencepiece and protobuf") as error:
        TextTokenizer.load(tmp_path / "x.model")
    assert "mmscale[sentencepiece]" in error.value.remedy
