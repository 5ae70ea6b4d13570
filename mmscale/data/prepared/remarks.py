"""Remarks on a prepared data set that its user should read: lost parts of pictures, unknown words, repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.config import PrepareConfig
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import remarks
from mmscale.data.prepared.content_facts import ContentFacts, content_facts
from mmscale.data.prepared.encode import text_remarks
from mmscale.data.prepared.leaks import compare_companion
from mmscale.data.prepared.manifest import TEXT, Manifest, read_manifest
from mmscale.data.prepared.parts import total_tallies
from mmscale.data.prepared.reuse import companion_of
from mmscale.errors import DataError


def remarks_on(folder: Path, manifest: Manifest, codecs: Mapping[str, Codec], settings: PrepareConfig) -> list[str]:
    """Sentences, each on one line.

    Args:
        folder: the data set.
        manifest: of it.
        codecs: its tokenizers of items by modality.
        settings: its settings. The data set whose tokenizers it uses (`--like`) is compared too.
    """
    tallies = total_tallies(folder)
    found = [line for name, codec in codecs.items() for line in remarks(name, tallies.get(name, {}), codec)]
    found += text_remarks(tallies.get(TEXT, {}))
    facts = content_facts(folder, manifest)
    found += _without_effect(facts, settings)
    return found + ([] if facts is None else facts.notes()) + _of_companion(folder, manifest, companion_of(settings))


def _without_effect(facts: ContentFacts | None, settings: PrepareConfig) -> list[str]:
    """Whether `data.prepare.held_out` is set and no document is without a `split`."""
    if facts is None or facts.groups is None or facts.groups.hashed:
        return []
    if "held_out" not in settings.model_fields_set or companion_of(settings) is not None:
        return []
    return ["note: data.prepare.held_out has no effect: every document names its split"]


def _of_companion(folder: Path, manifest: Manifest, like: Path | None) -> list[str]:
    """What one of this data set and the one with the same tokenizers trains on and the other one holds out."""
    if like is None:
        return []
    try:
        other = read_manifest(like)
    except DataError:  # only its tokenizers are left
        return []
    if other.tokenizers != manifest.tokenizers:
        return []
    found = compare_companion(folder, manifest, like, other)
    return [] if found is None else [f"note: {line}" for line in found.lines(folder)]
