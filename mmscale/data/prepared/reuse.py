"""Preparing a second data set for a blend: settings that reuse another set's tokenizers, and a check beforehand.

Two data sets can be mixed only if their ids have the same meaning. This module reads small files of the other set and
fits nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.config import Config, PrepareConfig
from mmscale.data.documents.schema import article
from mmscale.data.modalities import image_kinds, image_tokens, text_tokens
from mmscale.data.modalities.fit import LOAD
from mmscale.data.modalities.image_settings import SETTINGS
from mmscale.data.modalities.table import MODALITIES, folder_of, load_codec
from mmscale.data.prepared.manifest import MANIFEST, NO_TOKENIZER, Manifest, read_manifest
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import DataError

_RECORD = "source.json"  # the settings that a data set was prepared with (prepare.py)
_SINGLE_USE = ("path", "fit_patches", "residual")  # settings for fitting, which a reused codebook does not need


def settings_like(folder: Path, given: PrepareConfig | None = None) -> list[str]:
    """Overrides that give a new data set the vocabulary, the tokenizers and the held-out share of a prepared one.

    With another share, documents of a group that one set holds out would be training documents of the other.

    Args:
        folder: the prepared data set.
        given: the new set's settings. A share that they name is kept.

    Returns:
        `KEY=VALUE` lines for `vocab` and `data.prepare`.

    Raises:
        DataError: it is missing or damaged.
    """
    manifest = read_manifest(folder, setting="--like")
    ranges = zip(manifest.modalities, manifest.ranges, strict=True)
    modalities = [
        {"name": name, "size": end - start} | ({"marks": True} if name in manifest.marked else {})
        for name, (start, end) in ranges
    ]
    found: dict[str, Any] = {
        "vocab.modalities": modalities,
        "data.prepare.text.load": str(folder / text_tokens.FOLDER / text_tokens.FILE),
    }
    if manifest.reserved:
        found["vocab.reserved"] = True
    held_out = _record(folder).get("held_out")
    if held_out is not None and (given is None or "held_out" not in given.model_fields_set):
        found["data.prepare.held_out"] = held_out
    others = {name: {LOAD: str(folder / folder_of(name))} for name in manifest.tokens_per_item if name != IMAGE}
    if others:
        found["data.prepare.modalities"] = others
    place = folder / image_tokens.FOLDER
    if manifest.image_tokenizer != NO_TOKENIZER:
        fitting = image_kinds.load_image_tokenizer(place).fitting
        known = {"fit": fitting.fit, "background": list(fitting.background)} | _image_settings(folder)
        found |= {f"data.prepare.image.{key}": value for key, value in known.items() if key not in _SINGLE_USE}
        found["data.prepare.image.path"] = str(place)
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def check_vocabulary_like(folder: Path, config: Config) -> None:
    """Refuse a configuration whose vocabulary differs from a prepared data set's.

    Raises:
        DataError: they differ; training with this configuration would refuse the new data set.
    """
    manifest = read_manifest(folder)
    if manifest.vocabulary != Vocabulary.from_config(config.vocab).fingerprint:
        ranges = zip(manifest.modalities, manifest.ranges, strict=True)
        own = ((name, end - start, name in manifest.marked) for name, (start, end) in ranges)
        given = ((one.name, one.size, one.marks) for one in config.vocab.modalities)
        has, wants = _sizes(own, manifest.reserved), _sizes(given, config.vocab.reserved)
        raise DataError(
            f"data prepare --like {folder}: its vocabulary is {has}, the configuration's {wants}",
            remedy="give vocab the sizes, marks and reserved ids of the data set: ids of both must mean the same",
        )


def check_fit_like(folder: Path, config: Config) -> None:
    """Refuse a configuration that converts pictures to squares in another way than a prepared data set.

    Raises:
        DataError: it names another way; a configuration that names none is accepted.
    """
    if config.data.prepare is None or not (folder / image_tokens.FOLDER).is_dir():
        return
    image, has = config.data.prepare.image, image_kinds.load_image_tokenizer(folder / image_tokens.FOLDER).fitting
    for key, own, wanted in (
        ("fit", has.fit, image.fit),
        ("background", list(has.background), list(image.background)),
    ):
        if key in image.model_fields_set and own != wanted:
            raise DataError(
                f"data prepare --like {folder}: its pictures have {key} {own}, data.prepare.image.{key} is {wanted}",
                remedy=f"set data.prepare.image.{key} to {own}: one picture must get the same codes in both",
            )


def companion_of(settings: PrepareConfig) -> Path | None:
    """The prepared data set whose text tokenizer these settings reuse (`--like`); None: they name none."""
    if not settings.text.load:
        return None
    file = Path(settings.text.load)
    return file.parent.parent if file.parts[-2:] == (text_tokens.FOLDER, text_tokens.FILE) else None


def check_companions(config: Config, settings: PrepareConfig, out: Path, *, overwrite: bool) -> list[str]:
    """Compare the tokenizers that `out` will have with those of the data sets that it is going to be mixed with.

    Args:
        config: names the blend and the validation sets; if it names none, the data sets beside `out` are compared.
        settings: how `out` is prepared.
        out: folder of the new data set.
        overwrite: a data set of other documents in `out` is deleted, with its tokenizers.

    Returns:
        Notes for the user if `out` is not part of the configuration's data.

    Raises:
        DataError: `out` is part of the configuration's data, and its tokenizers would differ from those of a data
            set that is already prepared.
    """
    named = [Path(source.path) for source in config.data.sources] + [
        Path(one) for one in config.data.validation.values()
    ]
    mixed = any(one.resolve() == out.resolve() for one in named)
    reused = settings.text.load or settings.image.path
    for folder in named or ([] if reused else _beside(out)):
        if folder.resolve() == out.resolve():
            continue
        try:
            manifest = read_manifest(folder)
        except DataError:
            continue  # not prepared yet
        what = _differs(config, settings, out if not overwrite else None, manifest)
        if not what:
            continue
        like = ["--like", str(folder)]
        if not mixed:
            return [
                f"note: {out} gets {what} of its own; to train on it together with {folder}, add {shlex.join(like)}"
            ]
        again = ["--overwrite"] if _is_begun(out) else []
        raise DataError(
            f"data: {out} would get {what} of its own, but the configuration mixes it with {folder}: one id would mean "
            "two things",
            remedy=f"reuse the tokenizers of {folder}: add `{shlex.join([*like, *again])}` to this command",
        )
    return []


def _beside(out: Path) -> list[Path]:
    """Prepared data sets in the same folder."""
    return sorted(file.parent for file in out.parent.glob(f"*/{MANIFEST}"))


def _differs(config: Config, settings: PrepareConfig, out: Path | None, manifest: Manifest) -> str:
    """Names of the tokenizers that would differ from those of `manifest`; empty: they are the same."""
    found = []
    if _text_fingerprint(config, settings, out) != manifest.text_tokenizer:
        found.append("a text tokenizer")
    wanted = manifest.image_tokenizer
    if wanted != NO_TOKENIZER and _image_fingerprint(config, settings, out) != wanted:
        found.append("an image tokenizer")
    for name, fingerprint in manifest.tokenizers.items():
        if name in MODALITIES and name != IMAGE and _fingerprint(name, settings, out) != fingerprint:
            found.append(f"{article(name)} tokenizer")
    return " and ".join(found)


def _text_fingerprint(config: Config, settings: PrepareConfig, out: Path | None) -> str:
    """Fingerprint of the tokenizer that `out` has, will load, or that needs no training; empty: it will be trained."""
    own = [] if out is None else [out / text_tokens.FOLDER / text_tokens.FILE]
    named = [] if settings.text.load is None else [Path(settings.text.load)]
    file = next((file for file in (*own, *named) if file.is_file()), None)
    if file is None and settings.text.kind == "bytes":
        vocabulary = Vocabulary.from_config(config.vocab)
        low, high = vocabulary.ranges[0]
        tokenizer = text_tokens.TextTokenizer.of_bytes(size=high - low, specials=vocabulary.specials)
        return tokenizer.fingerprint()
    return "" if file is None else text_tokens.TextTokenizer.load(file).fingerprint()


def _fingerprint(name: str, settings: PrepareConfig, out: Path | None) -> str:
    """Fingerprint of another modality's tokenizer that `out` has or will load; empty: it will be fitted."""
    own = [] if out is None else [out / folder_of(name)]
    load = settings.modalities.get(name, {}).get(LOAD)
    named = [] if load is None else [Path(str(load))]
    folder = next((folder for folder in (*own, *named) if folder.is_dir()), None)
    return "" if folder is None else load_codec(name, folder).fingerprint()


def _image_fingerprint(config: Config, settings: PrepareConfig, out: Path | None) -> str:
    """Fingerprint of the tokenizer that `out` has, will load, or that needs no fit; empty: it will be fitted."""
    own = [] if out is None else [out / image_tokens.FOLDER]
    named = [] if settings.image.path is None else [Path(settings.image.path)]
    folder = next((folder for folder in (*own, *named) if (folder / SETTINGS).is_file()), None)
    if folder is not None:
        return image_kinds.load_image_tokenizer(folder).fingerprint()
    image, names = settings.image, config.vocab.names
    if IMAGE not in names:
        return ""
    made = image_kinds.without_images(image, config.vocab.modalities[names.index(IMAGE)].size)
    return "" if made is None else made.fingerprint()


def _image_settings(folder: Path) -> dict[str, Any]:
    """Settings of `data.prepare.image` that the data set was prepared with."""
    recorded = _record(folder).get("image")
    if isinstance(recorded, dict):
        return recorded
    try:
        own = bounded.read_object(folder / image_tokens.FOLDER / SETTINGS)
        return {key: own[key] for key in ("kind", "size", "channels", "patch") if key in own}
    except (OSError, *bounded.BAD_CONTENT) as error:
        raise DataError(
            f"data: the image tokenizer of {folder} cannot be read: {error}", remedy="copy the data set again"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    """The settings `data.prepare` that a data set was prepared with; empty if another program prepared it."""
    try:
        return dict(bounded.read_object(folder / _RECORD)["settings"])
    except (OSError, *bounded.BAD_CONTENT):
        return {}


def _is_begun(out: Path) -> bool:
    return (out / _RECORD).is_file()


def _sizes(modalities: Iterable[tuple[str, int, bool]], reserved: bool) -> str:
    sizes = " + ".join(f"{size} {name}{' (marks)' if marks else ''}" for name, size, marks in modalities)
    return f"{sizes}, with reserved ids" if reserved else sizes
