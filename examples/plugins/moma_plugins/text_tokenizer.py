"""Byte-level BPE in which every digit is a token of its own, so that numbers of any length look alike."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


class DigitsApart:
    """Trains the tokenizer.

    Args:
        ids: largest number of ids; given by mmscale, without the special tokens, which it adds itself.
        min_frequency: how often a pair must occur to become a token.
    """

    def __init__(self, ids: int, *, min_frequency: int = 2) -> None:
        self.ids, self.min_frequency = ids, min_frequency

    def train(self, texts: Iterator[str]) -> Tokenizer:
        """A tokenizer of the text of training documents."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.ids,
            min_frequency=self.min_frequency,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer
