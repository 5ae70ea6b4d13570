"""`mmscale data retrieve`: finds the neighbours of the documents of a prepared data set and stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.apply import LAYER, SCRATCH
from mmscale.data.dedup.find import clusters_of, own_folder
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.dedup.work import plan_work
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, TRAIN, Manifest, has_documents, read_manifest
from mmscale.data.prepared.neighbours import NO_NEIGHBOUR, write_neighbours
from mmscale.data.prepared.selection import SelectionFile, read_selection
from mmscale.data.progress import Reporter
from mmscale.data.retrieval.embed import Embeddings, TokenEmbedding, count_tokens, normalised
from mmscale.data.retrieval.nearest import Bank, Queries, nearest
from mmscale.data.retrieval.request import RetrievalRequest, check_request, read_embeddings
from mmscale.data.stream.source import Source


@dataclass(frozen=True, eq=False)
class _Embedded:
    """Embeddings of a split: of whole documents, and as queries."""

    whole: Embeddings
    dropped: Embeddings


def retrieve(folder: Path, request: RetrievalRequest, *, workers: int, reporter: Reporter) -> dict[str, Any]:
    """Find and store the neighbours of all documents. All of them are training documents.

    No document of the same cluster of duplicates is a neighbour, nor one that has content of held-out documents, nor
    one that the data set's weights exclude from training.

    Args:
        folder: a prepared data set.
        request: what to look for.
        workers: processes that look for duplicates.
        reporter: shows the progress.

    Returns:
        The findings, ready for JSON.

    Raises:
        DataError: the data set or a file of embeddings is missing or damaged.
        UsageError: embeddings are given for held-out documents only.
    """
    check_request(folder, request)
    manifest = read_manifest(folder)
    of = identity_of(folder, manifest)
    selection = read_selection(folder, of=of)
    name = "" if selection is None else selection.identity
    sources = {TRAIN: Source(folder, split=TRAIN, vocabulary=manifest.vocab, selection=name)}
    if has_documents({folder: manifest}, HELD_OUT):
        sources[HELD_OUT] = Source(folder, split=HELD_OUT, vocabulary=manifest.vocab)
    embedded = _given(request, sources) if request.embeddings else _computed(request, sources, manifest, reporter)
    clusters, clean = _clusters(folder, selection, HELD_OUT in sources, workers=workers, reporter=reporter)
    weights = sources[TRAIN].selection
    kept = np.ones(len(clean), bool) if weights is None else weights.weights(slice(None)) > 0.0
    bank = Bank(embedded[TRAIN].whole, clusters, clean & kept, request.most_similar)
    tables, facts = {}, {}
    for split, own in embedded.items():
        queries = Queries(own.whole, own.dropped, clusters if split == TRAIN else np.full(len(own.whole), -1))
        with reporter.bar(f"neighbours of {split}", len(own.whole)) as advance:
            tables[split], similarity = nearest(queries, bank, columns=request.columns, advance=advance)
        facts[split] = _facts(tables[split], similarity)
    made = request.described() | {"allowed": int(bank.allowed.sum()), "found": facts}
    written = write_neighbours(folder, tables, of=of, made=made)
    keys = {split: table.key for split, table in written.splits.items()}
    return {"folder": str(folder), "documents": len(clean), "tables": keys} | made


def _computed(
    request: RetrievalRequest, sources: Mapping[str, Source], manifest: Manifest, reporter: Reporter
) -> dict[str, _Embedded]:
    """Embeddings from token ids."""
    with reporter.part("embedding documents"):
        counts = {
            split: count_tokens(source, manifest.vocab, dropout=request.dropout, seed=request.seed)
            for split, source in sources.items()
        }
        made = TokenEmbedding(counts[TRAIN].whole, dimensions=request.dimensions, seed=request.seed)
        return {split: _Embedded(made.of(own.whole), made.of(own.dropped)) for split, own in counts.items()}


def _given(request: RetrievalRequest, sources: Mapping[str, Source]) -> dict[str, _Embedded]:
    """The user's embeddings."""
    files = {TRAIN: request.embeddings, HELD_OUT: request.held_out_embeddings}
    found = {
        split: normalised(read_embeddings(file, len(sources[split]), split).astype(np.float32))
        for split, file in files.items()
        if file is not None and split in sources
    }
    return {split: _Embedded(rows, rows) for split, rows in found.items()}


def _clusters(
    folder: Path, selection: SelectionFile | None, held_out: bool, *, workers: int, reporter: Reporter
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Clusters of duplicates by the rule that `data dedup` was applied with, and documents without held-out content."""
    layers = () if selection is None else selection.layers
    applied = next((layer.made["rule"] for layer in layers if layer.name == LAYER and "rule" in layer.made), None)
    rule = DuplicateRule(**(applied or {}))
    with own_folder(folder / SCRATCH) as own:
        work = plan_work(folder, own, rule=rule, against=[(folder, HELD_OUT)] if held_out else [])
        return clusters_of(work, workers=workers, reporter=reporter)


def _facts(table: NDArray[np.int64], similarity: NDArray[np.float32]) -> dict[str, Any]:
    """Numbers about the neighbours of a split, for people."""
    given = table != NO_NEIGHBOUR
    first = similarity[given[:, 0], 0]
    return {
        "documents": len(table),
        "with_neighbours": int(given.any(axis=1).sum()),
        "neighbours": round(float(given.sum(axis=1).mean()), 2),
        "nearest": round(float(first.mean()), 3) if len(first) else None,
    }
