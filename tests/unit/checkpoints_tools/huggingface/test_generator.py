"""Prompts of the generator: where images stand, and characters that a text tokenizer does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from checkpoints_tools.huggingface.prompts import Prompt, document_of, refuse_unknown_characters
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.errors import DataError, UsageError

A, B = Path("a.png"), Path("b.png")


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        (Prompt("what is it", (A,)), [A, "what is it"]),
        (Prompt("", (A, B)), [A, B]),
        (Prompt("one <image> and <image>", (A, B)), ["one ", A, " and ", B]),
        (Prompt("<image><image> differ", (A, B)), [A, B, " differ"]),
        (Prompt("the word <image>"), ["the word <image>"]),
        (Prompt(""), []),
    ],
)
def test_images_stand_at_their_places_or_before_the_text(prompt: Prompt, want: list[str | Path]) -> None:
    assert document_of(prompt) == want


def test_as_many_places_as_images() -> None:
    with pytest.raises(UsageError, match="the prompt has 1 <image> for 2 images"):
        document_of(Prompt("<image>", (A, B)))


def words() -> PreTrainedTokenizerFast:
    """Knows two words; all else is one token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "bus": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def letters() -> PreTrainedTokenizerFast:
    """Knows three letters; all else it drops."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, " ": 3}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_a_tokenizer_does_not_know_is_named() -> None:
    refuse_unknown_characters(words(), "red bus")
    with pytest.raises(DataError, match="does not know 'green'"):
        refuse_unknown_characters(words(), "green bus")
    refuse_unknown_characters(letters(), "abc cab")
    with pytest.raises(DataError, match="does not know 'é', '漢'"):
        refuse_unknown_characters(letters(), "ab漢é")


def test_bytes_know_everything() -> None:
    trained = TextTokenizer.train(["draw a seven"] * 3, size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.tokenizer)
    refuse_unknown_characters(tokenizer, "Übergröße 漢字 🙂\n\ttabs <boi> <pad>")
    with pytest.raises(DataError, match="no valid UTF-8"):
        refuse_unknown_characters(tokenizer, "\udce4")
