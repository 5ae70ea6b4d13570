# mmscale/data/prepared/selection.py: what is written; what training reads of it: test_selection.py of data/stream.
"""Tests of weights that several commands write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import parts_of, read_manifest
from mmscale.data.prepared.selection import read_selection, remove_layer, write_layer
from tests.unit.data.corpora import corpus, prepare

DOCUMENTS = 40


def test_layers_that_are_written_at_once_all_stay(tmp_path: Path) -> None:
    """Each command reads the list of layers and writes it with its own: 8 of them, in 8 threads."""
    folder = tmp_path / "set"
    prepare(folder, corpus(DOCUMENTS, seed=0))
    manifest = read_manifest(folder)
    parts, of = parts_of(folder, manifest, "train"), identity_of(folder, manifest)
    documents = sum(part.documents for part in parts)

    def write(number: int) -> None:
        weights = np.arange(documents) != number
        write_layer(folder, manifest, parts, weights, name=f"layer{number}", of=of, made={})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    found = read_selection(folder, of=of)
    assert found is not None and [layer.name for layer in found.layers] == [f"layer{number}" for number in range(8)]
    assert found.kept == documents - 8 and not list(folder.rglob("*.tmp"))
    assert remove_layer(folder, manifest, parts, name="layer3", of=of)
