"""Remarks on a prepared data set that its user should read: lost parts of pictures, unknown words, repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import remarks
from mmscale.data.prepared.content_facts import content_facts
from mmscale.data.prepared.encode import text_remarks
from mmscale.data.prepared.leaks import compare_companion
from mmscale.data.prepared.manifest import TEXT, Manifest, read_manifest
from mmscale.data.prepared.parts import total_tallies
from mmscale.errors import DataError


def remarks_on(folder: Path, manifest: Manifest, codecs: Mapping[str, Codec], *, like: Path | None = None) -> list[str]:
    """Sentences, each on one line.

    Args:
        folder: the data set.
        manifest: of it.
        codecs: its tokenizers of items by modality.
        like: the data set whose tokenizers it uses; its held-out documents are compared too.
    """
    tallies = total_tallies(folder)
    found = [line for name, codec in codecs.items() for line in remarks(name, tallies.get(name, {}), codec)]
    found += text_remarks(tallies.get(TEXT, {}))
    facts = content_facts(folder, manifest)
    return found + ([] if facts is None else facts.notes()) + _of_companion(folder, manifest, like)


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
