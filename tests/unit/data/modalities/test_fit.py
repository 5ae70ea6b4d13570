# mmscale/data/modalities/fit.py: what is said about the tokenizers that it made.
"""Tests of messages about tokenizers."""

from __future__ import annotations

import pytest

from mmscale.data.modalities.fit import _used


@pytest.mark.parametrize(
    ("ids", "size", "words"),
    [(337, 384, "337 of 384 ids in use; these texts repeat too little"), (1024, 1024, "all 1024 ids in use; more ids")],
)
def test_ids_in_use_say_what_follows(ids: int, size: int, words: str) -> None:
    assert _used(ids, size, load=None).startswith(words)


def test_no_other_size_is_advised_for_a_tokenizer_of_another_data_set() -> None:
    """`--like` fixes the vocabulary."""
    assert _used(1024, 1024, load="data/own/text_tokenizer/tokenizer.json") == (
        "1024 of 1024 ids in use, from data/own/text_tokenizer/tokenizer.json"
    )
