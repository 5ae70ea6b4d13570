"""The table of modalities besides text, and their tokenizers in the folder of a data set.

A new modality is a file in this folder and its name in the last line of the table. Plug-ins call `register`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Item, know_modality
from mmscale.data.modalities.audio import AudioModality
from mmscale.data.modalities.image import ImageModality
from mmscale.data.modalities.modality import Codec, Codes, Modality, Tally, Values, count
from mmscale.errors import DataError, MmscaleError

SALVAGED = "salvaged"  # key of tallies
MODALITIES: dict[str, type[Modality]] = {}


def register(modality: type[Modality]) -> type[Modality]:
    """Add a modality, so that documents may contain its items and data sets its tokenizer."""
    MODALITIES[modality.name] = modality
    know_modality(modality.name, modality.suffixes)
    return modality


for _modality in (ImageModality, AudioModality):
    register(_modality)


def folder_of(name: str) -> str:
    """Name of the folder of a modality's tokenizer inside a data set."""
    return f"{name}_tokenizer"


def load_codec(name: str, folder: Path) -> Codec:
    """Read a modality's tokenizer.

    Args:
        name: of the modality, in the table.
        folder: in which the tokenizer was saved.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        for file in MODALITIES[name].files:
            # Checked here, because codecs that are shipped with exports cannot import `bounded`.
            if file.endswith(".json"):
                bounded.read_json(folder / file)
        return MODALITIES[name].load(folder)
    except MmscaleError:
        raise
    except Exception as error:  # codecs of plug-ins may raise anything for a damaged file
        raise DataError(
            f"{name} tokenizer: {folder} cannot be read: {error or type(error).__name__}",
            remedy=f"name a folder that holds a fitted {name} tokenizer, or prepare the data again",
        ) from error


def open_codecs(folder: Path) -> dict[str, Codec]:
    """The tokenizers of a prepared data set by modality, without that of text.

    Raises:
        DataError: one is damaged.
    """
    return {
        name: load_codec(name, folder / folder_of(name)) for name in MODALITIES if (folder / folder_of(name)).is_dir()
    }


def read_item(item: Item, codec: Codec, tally: Tally | None = None, *, salvage: bool = False) -> Values:
    """An item in the form that its tokenizer needs.

    Args:
        item: of a document.
        codec: the tokenizer.
        tally: counts conversions of items, if their modality has `modality.Counting`.
        salvage: read a damaged item as far as possible, if its modality has `modality.Salvaging`.

    Raises:
        BadDocumentError: it cannot be read.
    """
    modality: Any = MODALITIES[item.modality]
    try:
        if tally is not None and hasattr(modality, "read_counted"):
            return np.asarray(modality.read_counted(item.source, codec, tally))
        return np.asarray(modality.read(item.source, codec))
    except (ValueError, OSError) as error:
        if salvage and hasattr(modality, "salvage"):
            with contextlib.suppress(ValueError, OSError):
                whole = dataclasses.replace(item, source=modality.salvage(item.source))
                values = read_item(whole, codec, tally)
                count(tally if tally is not None else {}, {SALVAGED: 1})
                return values
        why = str(error) or type(error).__name__
        raise BadDocumentError(f"{item.modality} {item.name} is unreadable: {why}") from error


def remarks(name: str, tally: Mapping[str, float], codec: Codec) -> list[str]:
    """Sentences about conversions of a modality's items while they were read."""
    modality: Any = MODALITIES[name]
    found = list(modality.remarks(tally, codec)) if tally and hasattr(modality, "remarks") else []
    if salvaged := int(tally.get(SALVAGED, 0)):
        found.append(f"{salvaged:,} damaged {name}s show what could be read of them (data.prepare.{name}.damaged)")
    return found


def plural(name: str) -> str:
    """What messages call several items of a modality."""
    return str(getattr(MODALITIES.get(name), "plural", f"{name} items"))


def decode_item(name: str, codes: Sequence[int] | Codes, codec: Codec | None) -> Values | None:
    """The values of one item's codes; None if the item is incomplete, or its tokenizer cannot decode."""
    numbers = np.asarray(codes, dtype=np.int64)
    if name not in MODALITIES or codec is None or len(numbers) != codec.tokens_per_item:
        return None
    if numbers.max() >= codec.vocab_size:
        return None
    try:
        return np.asarray(codec.decode(numbers[None])[0])
    except (ValueError, DataError):
        return None
