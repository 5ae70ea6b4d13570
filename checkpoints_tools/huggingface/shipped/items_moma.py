"""Items other than text and images, and their tokenizers. Shipped next to the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import cached_file

from .grammar_moma import ImageGrammar


@dataclass(frozen=True)
class ItemCodec:
    """The tokenizer of a modality besides text and images, and its ids.

    Attributes:
        modality: reads and writes its files.
        codec: items to codes and back.
        first, end: half-open range of its ids.
        opens, closes: ids around an item.
    """

    modality: Any
    codec: Any
    first: int
    end: int
    opens: int
    closes: int

    def grammar(self) -> ImageGrammar:
        """Keeps generated items complete."""
        return ImageGrammar(
            self.first,
            self.end,
            tokens=self.codec.tokens_per_item,
            boi=self.opens,
            eoi=self.closes,
            codes=self.codec.vocab_size,
        )


@dataclass(frozen=True)
class ItemPiece:
    """A generated item that is not an image.

    Attributes:
        modality: its name.
        values: decoded by its tokenizer; for audio samples -1..1.
        codec: the tokenizer, which knows sizes and rates.
    """

    modality: str
    values: np.ndarray
    codec: ItemCodec

    @property
    def suffix(self) -> str:
        """Suffix of its files, with the dot."""
        return str(self.codec.modality.written)

    def save(self, file: Any) -> None:
        """Write it as a file; audio: WAV."""
        self.codec.modality.write(self.values, Path(file), self.codec.codec)


def codec_folder(source: str, modality: Any, kwargs: dict[str, Any]) -> Path:
    """The folder of a modality's tokenizer; for a repository, its files are downloaded."""
    known = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
    files = [cached_file(source, f"{modality.name}_tokenizer/{name}", **known) for name in modality.files]
    return Path(str(files[0])).parent


__all__ = ["ItemCodec", "ItemPiece", "codec_folder"]
