"""Text to token ids and back: byte-level BPE through Hugging Face `tokenizers`, trained here or loaded.

The ids are those of the text range, special tokens first. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmscale import bounded
from mmscale.data.modalities import foreign_tokens, sentencepiece_tokens
from mmscale.data.modalities.model_vocabulary import ids_of, with_ids
from mmscale.data.vocab import SPECIAL_TOKENS
from mmscale.errors import DataError, MmscaleError
from mmscale.runtime.atomic_files import write_atomic
from mmscale.tables import plugins
from mmscale.tables.plugins import Use

FOLDER = "text_tokenizer"
FILE = "tokenizer.json"
_MOST_BYTES = 256 << 20  # largest tokenizer.json; those with 256,000 tokens have about 35 MB
_BYTES = 256


class TextTokenizer:
    """A `tokenizers.Tokenizer` whose ids 0..4 are the special tokens, which encoding a text never produces.

    Args:
        tokenizer: ids 0..4 are SPECIAL_TOKENS.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # "<boi>" in a text must not start an image. The flag is not stored in tokenizer.json (tokenizers 0.23), so it
        # is set on every instance.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], *, size: int, specials: Sequence[str] = SPECIAL_TOKENS) -> TextTokenizer:
        """Train byte-level BPE that fits into the text range.

        Args:
            texts: the corpus; a small one gives fewer merges and leaves the rest of the range unused.
            size: ids of the text range, special tokens included [ids].
            specials: special tokens of the vocabulary, in the order of their ids.

        Raises:
            DataError: the range cannot hold special tokens and bytes.
        """
        least = len(specials) + _BYTES
        if size < least:
            raise DataError(
                f"vocab.modalities: text has {size} ids; byte-level BPE needs {len(specials)} special tokens "
                f"+ {_BYTES} bytes = {least}",
                remedy=f"give text at least {least} ids, or load a tokenizer that is smaller",
            )
        tokenizer = Tokenizer(models.BPE())
        # No space is added in front, so decoding returns exactly the encoded text; " seven" is the same piece wherever
        # it follows other text.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=list(specials),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def of_bytes(cls, *, size: int, specials: Sequence[str] = SPECIAL_TOKENS) -> TextTokenizer:
        """A token for each byte: BPE without merges. Arguments and errors as for `train`."""
        cls.train([], size=size, specials=specials)  # raises: the range is too small
        return cls.train([], size=len(specials) + _BYTES, specials=specials)

    @classmethod
    def load(cls, file: Path, *, size: int | None = None, specials: Sequence[str] = SPECIAL_TOKENS) -> TextTokenizer:
        """Read a tokenizer.json, of mmscale or another program, a .tiktoken file or a .model of sentencepiece.

        If the file does not have our special tokens at ids 0..4, all its ids are moved up by 5 (by more, if the
        vocabulary has begin and end tokens of further modalities). If its own special tokens have our names ("<s>"),
        they are renamed and ours replace them.

        Args:
            file: the tokenizer.json.
            size: ids of the text range, checked if given [ids].
            specials: special tokens of the vocabulary, in the order of their ids.

        Raises:
            DataError: the file is missing, damaged, of a kind whose ids cannot be moved, or too large.
        """
        try:
            content = read_content(file)
        except DataError:
            raise
        except Exception as error:  # readers may raise anything for a damaged file
            raise _unreadable(file, error) from error
        return cls.of(content, file, size=size, specials=specials)

    @classmethod
    def of(
        cls, content: Any, file: object, *, size: int | None, specials: Sequence[str] = SPECIAL_TOKENS
    ) -> TextTokenizer:
        """A tokenizer from the content of a tokenizer.json; as `load`.

        Args:
            content: plain data.
            file: its origin, for messages.
            size: as for `load`.
            specials: as for `load`.

        Raises:
            DataError: as for `load`.
        """
        try:
            tokenizer = Tokenizer.from_str(json.dumps(_with_our_specials(content, file, tuple(specials))))
        except DataError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise _unreadable(file, error) from error
        loaded = cls(tokenizer)
        if size is not None and loaded.vocab_size > size:
            raise DataError(
                f"text tokenizer: {file} needs {loaded.vocab_size} ids with {len(specials)} special tokens, "
                f"the text range has {size}",
                remedy=f"give text {loaded.vocab_size} ids in vocab.modalities or use a smaller tokenizer",
            )
        probes = loaded.encode_batch([*specials, " ".join(specials)])
        if any((ids < len(specials)).any() for ids in probes):
            raise DataError(
                f"text tokenizer: {file} turns the text {' '.join(specials)!r} into special tokens",
                remedy="use a tokenizer that does not hold these strings as ordinary words",
            )
        return loaded

    @property
    def vocab_size(self) -> int:
        """One past the largest id [ids]."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def longest(self) -> int:
        """Upper bound of the characters that one token stands for; a very large number if there is no bound.

        A byte-level token stands for at least one byte per character of its name. Others may drop or join text.
        """
        lossless = isinstance(self.tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and not self.tokenizer.normalizer
        return max(map(len, self.tokenizer.get_vocab(with_added_tokens=True))) if lossless else 1 << 40

    @cached_property
    def unknown(self) -> int | None:
        """Id for texts that the tokenizer has no token for; None: it can encode every text."""
        model = bounded.parse_json(self.tokenizer.to_str())["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self.tokenizer.token_to_id(name)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [tokens]; never a special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of several texts, each int64 [tokens]."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of ids; special tokens are left out."""
        return str(self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Hash of the vocabulary, the merges and all settings."""
        content = json.dumps(bounded.parse_json(self.tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, self.tokenizer.to_str(pretty=True))


def read_content(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json, or of another program's file after conversion.

    Raises:
        OSError, ValueError, DataError: it is missing or damaged.
    """
    if file.suffix == foreign_tokens.SUFFIX:
        return foreign_tokens.converted(file)
    if file.suffix == sentencepiece_tokens.SUFFIX:
        return sentencepiece_tokens.converted(file)
    return bounded.read_object(file, most=_MOST_BYTES)


def open_text_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer of a prepared data set.

    Raises:
        DataError: it is missing or damaged.
    """
    return TextTokenizer.load(folder / FOLDER / FILE)


def trained_by_plugin(
    use: Use, texts: Iterator[str], *, size: int, specials: Sequence[str] = SPECIAL_TOKENS
) -> TextTokenizer:
    """Train a tokenizer with a plug-in. The result is an ordinary tokenizer.json, so the plug-in is not needed later.

    Args:
        use: names the plug-in, and its arguments.
        texts: the corpus.
        size: ids of the text range, special tokens included [ids].
        specials: special tokens of the vocabulary, in the order of their ids.

    Raises:
        PluginError: the plug-in cannot be loaded.
        DataError: it fails, its result is not a tokenizer, or does not fit into the range.
    """
    plugins.check(use)
    made = plugins.make(use, size - len(specials))
    try:
        trained = made.train(texts)
    except MmscaleError:
        raise
    except Exception as error:  # a plug-in may raise anything
        raise DataError(
            f"text tokenizer: {use.name} cannot be trained: {type(error).__name__}: {error}",
            remedy="correct the plug-in, see docs/extending/text_tokenizer.md",
        ) from error
    if not isinstance(trained, Tokenizer):
        raise DataError(
            f"text tokenizer: {use.name} makes a {type(trained).__name__}, not a tokenizers.Tokenizer",
            remedy="return one from `train`, see docs/extending/text_tokenizer.md",
        )
    return TextTokenizer.of(bounded.parse_json(trained.to_str()), f"that of {use.name}", size=size, specials=specials)


def _unreadable(file: object, error: Exception) -> DataError:
    return DataError(
        f"text tokenizer: {file} cannot be read: {str(error).splitlines()[0]}",
        remedy="name a tokenizer.json of Hugging Face tokenizers",
    )


def _with_our_specials(content: dict[str, Any], file: object, specials: tuple[str, ...]) -> dict[str, Any]:
    """The content of a tokenizer.json, changed so that the special tokens have the first ids."""
    model, added = content["model"], content.get("added_tokens") or []
    if not isinstance(model["vocab"], dict) and not sentencepiece_tokens.hides_specials(content):
        raise DataError(
            f"text tokenizer: {file} is a {model.get('type')} model, whose ids cannot be moved",
            remedy="use a BPE, WordPiece or WordLevel tokenizer, or the .model file of sentencepiece",
        )
    vocabulary = ids_of(model)
    ids = {token["content"]: token["id"] for token in added} | vocabulary
    renamed = _same
    if any(ids.get(name) != index for index, name in enumerate(specials)):
        shift, renamed = len(specials), functools.partial(_renamed, specials=specials)
        vocabulary = {renamed(name): number + shift for name, number in vocabulary.items()}
        added = [token | {"content": renamed(token["content"]), "id": token["id"] + shift} for token in added]
    theirs = [token for token in added if token["content"] not in specials]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ours = [{"id": index, "content": name} | flags for index, name in enumerate(specials)]
    vocabulary = {name: index for index, name in enumerate(specials)} | vocabulary
    if model.get("unk_token") in specials:
        model = model | {"unk_token": _renamed(model["unk_token"], specials)}
    # Templates, truncation and padding would add tokens or silently cut documents.
    dropped = {"post_processor": None, "truncation": None, "padding": None}
    model = with_ids(model, vocabulary, renamed=renamed)
    return content | dropped | {"model": model, "added_tokens": ours + theirs}


def _same(name: str) -> str:
    return name


def _renamed(name: str, specials: tuple[str, ...]) -> str:
    return f"<former {name[1:]}" if name in specials else name
