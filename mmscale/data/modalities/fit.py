"""Creates the tokenizers of a data set: trained on a sample of its training documents, or loaded.

Everything is deterministic, so an interrupted run that is started again creates the same tokenizers. Held-out documents
are used only to measure the reconstruction of items. Each modality's own module fits its tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.config import PrepareConfig
from mmscale.config.plugins import use_of
from mmscale.data import digests
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Document, DocumentSlice, SplitName, Text
from mmscale.data.modalities import text_tokens
from mmscale.data.modalities.modality import Codec, Report, Sample
from mmscale.data.modalities.table import MODALITIES, folder_of, load_codec, read_item
from mmscale.data.modalities.text_tokens import TextTokenizer, trained_by_plugin
from mmscale.data.progress import Detail, Reporter
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError, DataError
from mmscale.runtime.atomic_files import new_folder

QUALITY = "quality.json"
LOAD = "load"  # setting of every modality: folder of a fitted tokenizer
_TEXT_CHARACTERS = 200_000_000  # more text hardly changes the merges, and counting it takes minutes
_MEASURED_ITEMS = 1024


def text_tokenizer(
    out: Path, settings: PrepareConfig, vocabulary: Vocabulary, slices: Sequence[DocumentSlice], reporter: Reporter
) -> TextTokenizer:
    """The data set's text tokenizer: that of an earlier run, or the one named in the settings, or a new one.

    Raises:
        DataError: it does not fit into the text range, or a named file cannot be read.
    """
    low, high = vocabulary.ranges[0]
    folder = out / text_tokens.FOLDER
    if (folder / text_tokens.FILE).is_file():
        try:
            return TextTokenizer.load(folder / text_tokens.FILE, size=high - low)
        except DataError:
            reporter.say(f"{folder} is damaged and made again")
    if settings.text.kind == "bytes":
        tokenizer = TextTokenizer.of_bytes(size=high - low, specials=vocabulary.specials)
    elif settings.text.load is not None:
        tokenizer = TextTokenizer.load(Path(settings.text.load), size=high - low, specials=vocabulary.specials)
    else:
        use = use_of(settings.text, "kind", key="kind")
        with reporter.part("text tokenizer") as on_progress:
            texts, size = _texts(slices, settings.held_out, on_progress), high - low
            if use is None:
                tokenizer = TextTokenizer.train(texts, size=size, specials=vocabulary.specials)
            else:
                use = dataclasses.replace(use, key="data.prepare.text.kind")
                tokenizer = trained_by_plugin(use, texts, size=size, specials=vocabulary.specials)
    tokenizer.save(folder)
    used = f"{tokenizer.vocab_size} of {high - low} ids in use, one a byte"
    if settings.text.kind != "bytes":
        used = _used(tokenizer.vocab_size, high - low, load=settings.text.load)
    reporter.say(f"text tokenizer: {used}")
    return tokenizer


def _used(ids: int, size: int, *, load: str | None) -> str:
    """How much of the text range a tokenizer uses, and what follows from that if it was trained on these texts."""
    if load is not None:
        return f"{ids} of {size} ids in use, from {load}"
    if ids < size:
        return f"{ids} of {size} ids in use; these texts repeat too little for more, the others stay unused"
    return f"all {size} ids in use; more ids in vocab.modalities would make documents shorter"


def item_tokenizers(
    out: Path, settings: PrepareConfig, vocabulary: Vocabulary, slices: Sequence[DocumentSlice], reporter: Reporter
) -> dict[str, Codec]:
    """The data set's other tokenizers by modality, likewise, for modalities of which there are items.

    Raises:
        ConfigError: their settings do not fit each other.
        DataError: codes do not fit into a range, or a named folder cannot be read.
    """
    found = {}
    for name in vocabulary.names[1:]:
        if name in MODALITIES and vocabulary.marks(name) is not None:
            codec = _item_tokenizer(name, out / folder_of(name), settings, vocabulary, slices, reporter)
            if codec is not None:
                found[name] = codec
    return found


def check_settings(settings: PrepareConfig, vocabulary: Vocabulary, *, out: Path | None = None) -> None:
    """Refuse settings with which a tokenizer cannot be made or loaded, before any document is read.

    Args:
        settings: of all modalities.
        vocabulary: has their ranges.
        out: the data set's folder, whose finished tokenizers are used as they are; None: all are made.

    Raises:
        ConfigError: settings of a modality that the vocabulary does not have; or they are unknown, or do not fit each
            other or the range.
        DataError: a named tokenizer cannot be read, or does not fit into its range.
    """
    for name in settings.modalities:
        if name not in MODALITIES or vocabulary.marks(name) is None:
            known = ", ".join(one for one in MODALITIES if vocabulary.marks(one)) or "none"
            raise ConfigError(
                f"data.prepare.modalities.{name}: no such modality in vocab.modalities with begin and end tokens "
                f"(there are: {known})",
                remedy="add it to vocab.modalities with marks: true, or remove its settings",
            )
    if out is None or not (out / text_tokens.FOLDER / text_tokens.FILE).is_file():
        _check_text(settings, vocabulary)
    for name in vocabulary.names[1:]:
        if name in MODALITIES and vocabulary.marks(name) and not (out and (out / folder_of(name)).is_dir()):
            low, high = vocabulary.range_of(name)
            _check_items(name, settings, high - low)


def _check_text(settings: PrepareConfig, vocabulary: Vocabulary) -> None:
    low, high = vocabulary.ranges[0]
    if settings.text.kind != "bpe" and settings.text.load is not None:
        raise ConfigError(
            f"data.prepare.text: kind is {settings.text.kind}, and load names a tokenizer",
            remedy="remove one of the two",
        )
    if settings.text.load is not None:
        digests.check_path(settings.text.load, "data.prepare.text.load")
        TextTokenizer.load(Path(settings.text.load), size=high - low, specials=vocabulary.specials)
    elif settings.text.kind in ("bpe", "bytes") and settings.source != "megatron":
        TextTokenizer.of_bytes(size=high - low, specials=vocabulary.specials)  # raises: the range is too small


def _check_items(name: str, settings: PrepareConfig, codes: int) -> None:
    modality: Any = MODALITIES[name]
    own, load = _own_settings(name, settings)
    if load is not None:
        digests.check_path(str(load), f"data.prepare.modalities.{name}.{LOAD}")
        _check_codes(name, load_codec(name, load), codes)
        return
    if hasattr(modality, "check"):
        with _named(name):
            codec = modality.check(own, settings, codes)
        if codec is not None:
            _check_codes(name, codec, codes)


def _own_settings(name: str, settings: PrepareConfig) -> tuple[dict[str, Any], Path | None]:
    """The settings of a modality, and the folder of a fitted tokenizer to use instead of them."""
    own = dict(settings.modalities.get(name, {}))
    load = own.pop(LOAD, None)
    if load is not None and own:
        raise ConfigError(
            f"data.prepare.modalities.{name}: load is given, and {', '.join(own)}",
            remedy="remove the other settings: the tokenizer in the folder has its own",
        )
    return own, None if load is None else Path(str(load))


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the name of a modality to errors about its settings."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"data.prepare.modalities.{name}: {error}", remedy="correct these settings") from error


def _check_codes(name: str, codec: Codec, codes: int) -> None:
    if codec.vocab_size > codes:
        raise DataError(
            f"{name} tokenizer: {codec.kind} has {codec.vocab_size} codes, the {name} range {codes} ids",
            remedy=f"give {name} {codec.vocab_size} ids in vocab.modalities",
        )


def _item_tokenizer(
    name: str,
    folder: Path,
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    slices: Sequence[DocumentSlice],
    reporter: Reporter,
) -> Codec | None:
    what = f"{name} tokenizer"
    if folder.is_dir():
        try:
            return load_codec(name, folder)
        except DataError:
            reporter.say(f"{folder} is damaged and made again")
    low, high = vocabulary.range_of(name)
    items = Sample(name, slices, settings)
    with reporter.part(what) as on_progress:
        codec = _made(name, items, high - low, Report(on_progress, reporter.say))
    if codec is None:
        return None
    _check_codes(name, codec, high - low)
    with reporter.part(what) as on_progress:
        on_progress("measuring what is lost")
        measured = _measure(codec, items)
    said = measured.pop("said", "")
    save_codec(codec, folder, measured=measured)
    on = f"; {said}" if said else ""
    size = f"{codec.vocab_size} codes, {codec.tokens_per_item} tokens per {name}"
    reporter.say(f"{what}: {codec.kind}, {size}{on}")
    return codec


def _made(name: str, items: Sample, codes: int, report: Report) -> Codec | None:
    own, load = _own_settings(name, items.settings)
    if load is not None:
        return load_codec(name, load)
    with _named(name):
        return MODALITIES[name].fit(own, items, codes, report)


def _measure(codec: Codec, items: Sample) -> dict[str, Any]:
    """Quality on held-out items, or on training items if none is held out."""
    splits: tuple[SplitName, ...] = ("validation", "train")
    most = getattr(codec, "measured_items", _MEASURED_ITEMS)
    for split in splits:
        found = []
        for item in itertools.islice(items.items(split, most), most):
            try:
                found.append(read_item(item, codec))
            except BadDocumentError:
                continue
        if found:
            measured = MODALITIES[items.modality].quality(codec, np.stack(found))
            if said := measured.get("said"):
                measured["said"] = f"{said} on {len(found)} {split} {items.modality}s"
            return measured | {"split": split}
    return {"codes_used": 0, "split": "train"}


def save_codec(codec: Codec, folder: Path, *, measured: dict[str, Any]) -> None:
    """Write a tokenizer and its measured quality into a folder, atomically."""
    with new_folder(folder) as temporary:
        codec.save(temporary)
        (temporary / QUALITY).write_text(json.dumps(measured, indent=1) + "\n")


def _documents(piece: DocumentSlice, split: SplitName, held_out: float) -> Iterator[Document]:
    """A slice's valid documents of one split; invalid ones are reported when the parts are made."""
    return (item for item in piece.read() if isinstance(item, Document) and item.split_for(held_out) == split)


def _texts(slices: Sequence[DocumentSlice], held_out: float, on_progress: Detail) -> Iterator[str]:
    """Training text, at most _TEXT_CHARACTERS, equally from the start of every slice."""
    share = _TEXT_CHARACTERS // max(1, len(slices))
    for number, piece in enumerate(slices, start=1):
        on_progress(f"reading text, part {number} of {len(slices)}")
        characters = 0
        for document in _documents(piece, "train", held_out):
            for content in document.content:
                if isinstance(content, Text):
                    characters += len(content.text)
                    yield content.text
            if characters >= share:
                break
    on_progress("choosing merges")
