"""The data sets of a blend, for the model card and the report of an export. Reads their manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmscale.config import Config, DataSource
from mmscale.data.prepared.manifest import TRAIN, read_manifest
from mmscale.errors import DataError


def blend_sources(config: Config, step: int) -> list[dict[str, Any]]:
    """Each data set of a blend; empty for a run on one data set.

    Args:
        config: of the run.
        step: for weights that change.

    Returns:
        `folder`, `weight`; if the folder can be read here, `documents` and `tokens` of the training split by modality,
        and `source`, the digest of its documents.
    """
    sources = config.data.sources
    return [_described(one, step) for one in sources] if len(sources) > 1 else []


def _described(source: DataSource, step: int) -> dict[str, Any]:
    found: dict[str, Any] = {"folder": source.path, "weight": source.weight_at(step)}
    try:
        manifest = read_manifest(Path(source.path))
    except DataError:
        return found
    train = manifest.splits.get(TRAIN)
    if train is not None:
        found["documents"] = train.documents
        found["tokens"] = {name: train.tokens(name) for name in manifest.modalities}
    return found | {"source": manifest.source}
