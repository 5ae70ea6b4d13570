"""Remarks on a prepared data set that its user should read: lost parts of pictures, unknown words, repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.data.documents.schema import TRAIN
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import remarks
from mmscale.data.prepared.content_facts import content_facts
from mmscale.data.prepared.encode import text_remarks
from mmscale.data.prepared.leaks import keep_companion
from mmscale.data.prepared.manifest import TEXT, Manifest, read_manifest
from mmscale.data.prepared.parts import total_tallies
from mmscale.data.prepared.shared_content import comparable, shared_with
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
    """Whether this data set trains on what the one with the same tokenizers holds out."""
    if like is None or TRAIN not in manifest.splits:
        return []
    try:
        other = read_manifest(like)
    except DataError:  # only its tokenizers are left
        return []
    if other.tokenizers != manifest.tokenizers or not (comparable(manifest) and comparable(other)):
        return []
    found = shared_with(folder, manifest, like, other)
    keep_companion(folder, manifest, like, other, found)
    return found.notes(of=str(like), here=str(folder))
