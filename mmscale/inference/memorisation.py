"""`mmscale eval --task memorisation`: how much of its training documents a model knows by heart.

The share of places whose next token is the most likely one, given the true tokens before it (exact memorisation of
Tirumala et al. 2022, arXiv 2205.10770), over training documents by how many equal copies the data set has, over
canaries by the same, and over held-out documents for comparison. `mmscale data score --by memorised:RUN` gives the same
share of single documents.

D documents, K modalities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import source_names
from mmscale.data.prepared.canaries import read_canaries
from mmscale.data.prepared.encode import Encoded
from mmscale.data.prepared.manifest import HELD_OUT, TRAIN, Manifest, read_manifest
from mmscale.data.prepared.questions import encoder_of
from mmscale.data.prepared.split_keys import comparable, document_key, document_keys
from mmscale.data.stream.composites import open_source
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.inference.chosen_data import with_data
from mmscale.inference.document_losses import LABELS, LIKELIEST
from mmscale.inference.scores import Scorer
from mmscale.train.steps.task_scores import NORMAL_95

DOCUMENTS = 256  # number of different documents of a group, at most


@dataclass(frozen=True)
class _Group:
    """Different documents of one split with similar numbers of copies.

    Attributes:
        kind: `training`, `canaries` or `held_out`.
        copies: smallest and largest number of copies.
        documents: their numbers in the split.
        mean: mean number of copies.
    """

    kind: str
    copies: tuple[int, int]
    documents: NDArray[np.int64]
    mean: float

    @property
    def name(self) -> str:
        """`training/1`, `training/3-4`, `canaries/16`, `held_out`."""
        low, high = self.copies
        return self.kind if not high else f"{self.kind}/{low}" if low == high else f"{self.kind}/{low}-{high}"


def memorisation(scorer: Scorer, config: Config, step: int | None) -> dict[str, Any]:
    """Memorisation of every data set of a configuration.

    Args:
        scorer: the model.
        config: names the data.
        step: optimizer steps that the model has done; None: unknown.

    Returns:
        `memorised/<group>` for each group (of several data sets `source/<name>/memorised/<group>`), and `memorisation`:
        for each group its `name`, `path`, `copies` [smallest, largest], `reads` (mean number of times that training
        has read such a document's content; None: unknown), `documents`, `contexts`, `memorised`, `by_modality`, and
        the 95 % interval `low`, `high`.

    Raises:
        DataError: a data set has no training documents, or is a Megatron corpus.
    """
    rows = []
    result: dict[str, Any] = {}
    passes = _passes(config, step)
    for name, path in (source_names(config) or {"": config.data.sources[0].path}).items():
        folder, prefix = Path(path), f"source/{name}/" if name else ""
        for row in _of_folder(scorer, with_data(config, folder), folder, passes=passes.get(str(folder))):
            result[f"{prefix}memorised/{row['name']}"] = row["memorised"]
            rows.append(row)
    return result | {"memorisation": rows}


def _passes(config: Config, step: int | None) -> dict[str, float]:
    """Passes over each data set up to a step, under the present settings, by its path."""
    if step is None:
        return {}
    found = open_mixture(config, TRAIN, vocabulary=Vocabulary.from_config(config.vocab))
    passes = found.passes(step * config.train.global_batch_size)
    return {str(source.folder): one for source, one in zip(found.sources, passes, strict=True)}


def _of_folder(scorer: Scorer, config: Config, folder: Path, *, passes: float | None) -> Iterator[dict[str, Any]]:
    vocabulary, manifest = Vocabulary.from_config(config.vocab), read_manifest(folder)
    if not comparable(manifest):
        raise DataError(
            f"data: {folder} is a Megatron corpus, whose documents are not compared",
            remedy="name another data set: --data DIR",
        )
    splits = [(TRAIN, _training_groups(config, folder, manifest)), (HELD_OUT, _held_out(folder, manifest))]
    for split, groups in splits:
        if groups:
            source = open_source(config, folder, split, vocabulary=vocabulary, weighted=False)
            for group in groups:
                reads = None if passes is None else passes * group.mean
                yield _measured(scorer, source, group, vocabulary.names) | {"path": str(folder), "reads": reads}


def _training_groups(config: Config, folder: Path, manifest: Manifest) -> list[_Group]:
    keys = document_keys(folder, manifest, TRAIN)
    source = open_source(config, folder, TRAIN, vocabulary=Vocabulary.from_config(config.vocab), weighted=True)
    every = np.arange(len(keys))
    weights = np.ones(len(keys)) if source.selection is None else source.selection.weights(every)
    different, first, of_key = np.unique(keys, return_index=True, return_inverse=True)
    copies = np.bincount(of_key, weights=weights)
    planted = np.isin(different, _canary_keys(config, folder))
    found = []
    for kind, members in (("training", ~planted), ("canaries", planted)):
        bucket = np.where(copies > 0, np.ceil(np.log2(np.maximum(copies, 1.0))), -1).astype(int)
        for number in np.unique(bucket[members]).tolist():
            own = np.flatnonzero(members & (bucket == number))
            counts = copies[own]
            bounds = (math.ceil(counts.min()), math.ceil(counts.max()))
            found.append(_Group(kind, bounds, _some(np.sort(first[own])), float(counts.mean())))
    return [group for group in found if group.copies[1]]  # documents of weight 0 are not read


def _canary_keys(config: Config, folder: Path) -> NDArray[np.uint64]:
    documents = [one.document for one in read_canaries(folder)]
    encoded = encoder_of(config).encode(documents) if documents else []
    return np.array([document_key(one.ids) for one in encoded if isinstance(one, Encoded)], dtype=np.uint64)


def _held_out(folder: Path, manifest: Manifest) -> list[_Group]:
    """Held-out documents that do not occur in training."""
    if HELD_OUT not in manifest.splits or not manifest.splits[HELD_OUT].documents:
        return []
    own, known = document_keys(folder, manifest, HELD_OUT), document_keys(folder, manifest, TRAIN)
    documents = np.flatnonzero(~np.isin(own, known))
    return [_Group("held_out", (0, 0), _some(documents), 0.0)] if len(documents) else []


def _some(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most DOCUMENTS of them, at equal distances."""
    places = np.linspace(0, len(documents) - 1, min(len(documents), DOCUMENTS)).astype(np.int64)
    return documents[np.unique(places)]


def _measured(scorer: Scorer, source: Source, group: _Group, names: Sequence[str]) -> dict[str, Any]:
    table = source.rows(group.documents)
    documents = np.split(source.read(group.documents, table), np.cumsum(table.lengths)[:-1])
    sums = scorer.document_sums(documents, table.trained)
    hits, labels = sums[..., LIKELIEST].sum(axis=1), sums[..., LABELS].sum(axis=1)
    share = float(hits.sum() / labels.sum()) if labels.sum() else math.nan
    # The variance of a ratio of sums over documents, whose tokens are not independent.
    half = NORMAL_95 * math.sqrt(float(((hits - share * labels) ** 2).sum())) / max(1.0, float(labels.sum()))
    of_modality = zip(names, sums.sum(axis=0), strict=True)
    return {
        "name": group.name,
        "copies": list(group.copies),
        "documents": len(documents),
        "contexts": int(labels.sum()),
        "memorised": share,
        "low": max(0.0, share - half),
        "high": min(1.0, share + half),
        "by_modality": {name: float(one[LIKELIEST] / one[LABELS]) for name, one in of_modality if one[LABELS]},
    }
