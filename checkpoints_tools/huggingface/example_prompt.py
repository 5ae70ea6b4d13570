"""Finds a prompt for the example in a model card: the beginning of a document of the data that the model has seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.manifest import HELD_OUT, TRAIN, read_blend
from mmscale.data.prepared.parts import read_document
from mmscale.data.vocab import Vocabulary
from mmscale.errors import MmscaleError

_DOCUMENTS = 64  # read of each split
_LONGEST = 80  # characters of a prompt
_WORDS = 4  # of a text


def example_prompt(config: Config, *, item: str) -> str | None:
    """A short prompt of a held-out document, or of a training document if none is held out.

    Args:
        config: names the data.
        item: the modality of an item that follows the prompt; "": none, the prompt is the beginning of a text.

    Returns:
        None: the data is not at its path, or none of the first documents has such a beginning.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    try:
        for text, ids in _documents(config):
            prompt = _before(ids, vocabulary, item, text) if item else _beginning(ids, vocabulary, text)
            if prompt and len(prompt) <= _LONGEST:
                return prompt
    except (MmscaleError, OSError):
        return None
    return None


def _documents(config: Config) -> Iterator[tuple[TextTokenizer, NDArray[np.int64]]]:
    blend = read_blend(config)
    for split in (HELD_OUT, TRAIN):
        for folder, manifest in blend.items():
            text, left = open_text_tokenizer(folder), _DOCUMENTS
            for part in manifest.splits[split].parts if split in manifest.splits else ():
                for index in range(min(left, part.documents)):
                    yield text, read_document(folder, part, index)
                left -= min(left, part.documents)


def _before(ids: NDArray[np.int64], vocabulary: Vocabulary, item: str, text: TextTokenizer) -> str:
    """The text before the first item; "" if there is none, or another item comes first."""
    marks = vocabulary.marks(item)
    places = np.flatnonzero(ids == marks[0]) if marks is not None else np.zeros(0, np.int64)
    head = ids[1 : places[0]] if len(places) else ids[:0]
    only_text = vocabulary.modality_of(head) == 0
    return text.decode(head).strip() if len(head) and only_text.all() else ""


def _beginning(ids: NDArray[np.int64], vocabulary: Vocabulary, text: TextTokenizer) -> str:
    """The first words of a document that begins with text."""
    other = np.flatnonzero(vocabulary.modality_of(ids) != 0)
    return " ".join(text.decode(ids[1 : other[0] if len(other) else None]).split()[:_WORDS])
