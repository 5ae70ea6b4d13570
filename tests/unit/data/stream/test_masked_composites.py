"""Causal masking of documents that are read with neighbours: only the document's own tokens move (RA-CM3)."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.data.holes import rotation
from mmscale.data.prepared.identity import identities, identity_of
from mmscale.data.prepared.manifest import read_blend, read_manifest
from mmscale.data.prepared.neighbours import read_neighbours, write_neighbours
from mmscale.data.stream.causal_masking import Masking, SpanChoice, token_runs
from mmscale.data.stream.composites import ComposedSource, NeighbourUse, StoredNeighbours
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import resume_stream
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOI, BOS, EOI, EOS, HOLES
from mmscale.tables.settings import DATA_ORDERS, IMAGE_SPANS
from tests.unit.data.corpora import prepare
from tests.unit.data.stream.test_causal_masking import OPTIONS, SEQ, TOKENS, TWO, reference, restored
from tests.unit.data.stream.test_causal_masking import config as masked_config

DOCUMENTS, WIDTH, MOST = 90, 3, 2
BITS = (3, 3, 1, 2)  # loss bits, by the number of a document


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """The second and third token of each tell it from the others; every second one has an image."""
    rng, made = np.random.default_rng(4), []
    for number in range(DOCUMENTS):
        image = [BOI, *rng.integers(100, 132, 8), EOI] if number % 2 else []
        text = rng.integers(60, 100, rng.integers(0, 12))
        made.append(np.array([BOS, 60 + number // 30, 70 + number % 30, *text, *image, EOS]).tolist())
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> Path:
    bits = [BITS[number % 4] for number in range(DOCUMENTS)]
    made = prepare(tmp_path_factory.mktemp("both") / "set", list(map(np.array, documents)), vocabulary=TWO, loss=bits)
    table = (np.arange(DOCUMENTS)[:, None] + np.arange(1, WIDTH + 1) * 7) % DOCUMENTS
    write_neighbours(made, {"train": table}, of=identity_of(made, read_manifest(made)), made={})
    return made


def mix(folder: Path, masking: Masking | None, *, loss: bool = True, **options: Any) -> Mixture:
    plain = Source(folder, split="train", vocabulary=TWO)
    neighbours = StoredNeighbours(plain, read_neighbours(folder).splits["train"].key, bank=len(plain))
    use = NeighbourUse(MOST, sampled=True, loss=loss)
    source = ComposedSource(plain, bank=plain, neighbours=neighbours, use=use, name="test")
    return Mixture([source], TWO, **{**OPTIONS, "masking": masking, "once": True, **options})


def composites(mixture: Mixture) -> list[tuple[list[int], list[bool]]]:
    """Tokens and trained labels of each composite of a pass."""
    found = []
    for index in range(mixture.len_epoch()):
        batch = mixture.micro_batch(index)
        assert batch.counts == tuple((batch.modality_ids == m).sum() for m in range(2)) == mixture.counts(index)
        labels = TWO.modality_of(batch.labels)
        assert batch.label_counts == tuple(int(batch.loss_mask[labels == m].sum()) for m in range(2))
        for row, numbers in enumerate(batch.document_ids):
            for number in np.unique(numbers):
                own = np.flatnonzero((numbers == number) & (batch.tokens[row] > 0))
                if len(own):
                    found.append((batch.tokens[row, own].tolist(), (batch.loss_mask[row, own] > 0).tolist()))
    return found


def spans_of(ids: list[int]) -> list[tuple[int, int]]:
    """The spans of a rotated document, found by its tokens."""
    spans: list[tuple[int, int]] = []
    for hole in [token for token in TOKENS[:-1] if token in ids]:
        first, again = (n for n, token in enumerate(ids) if token == hole)
        at = first + sum(stop - start - 1 for start, stop in spans)
        spans.append((at, at + ids[again:].index(TOKENS[-1]) - 1))
    return spans


@pytest.mark.parametrize("image_spans", list(IMAGE_SPANS))
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize(("order", "multiple"), list(itertools.product(DATA_ORDERS, (1, 8))))
def test_only_the_documents_own_tokens_move(
    folder: Path,
    documents: list[list[int]],
    image_spans: str,
    loss: bool,
    order: str,
    multiple: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=20))
    mixture = mix(folder, Masking(0.7, image_spans), loss=loss, order=order, document_multiple=multiple)
    choice = SpanChoice(masking=Masking(0.7, image_spans), seed=OPTIONS["seed"], source=0, seq_length=SEQ)
    runs = [token_runs(np.array(ids), TWO.modality_of(np.array(ids)), TWO) for ids in documents]
    queries, rotated, with_neighbours = [], 0, 0
    for ids, mask in composites(mixture):
        plain, spans = restored(ids, TWO), spans_of(ids)
        starts = [n for n, token in enumerate(plain) if token == BOS]
        *before, query = (documents.index(plain[a:b]) for a, b in itertools.pairwise([*starts, len(plain)]))
        assert set(before) <= {(query + 7 * column) % DOCUMENTS for column in (1, 2, 3)}
        alone = choice.spans(
            runs[query], number=len(spans), document=query, epoch=0, end=len(documents[query]) - 1
        )  # those that it has without neighbours
        assert spans == [(start + starts[-1], stop + starts[-1]) for start, stop in alone]
        assert ids == reference(plain, spans)[0]
        trained: list[bool] = []
        for one in (*before, query):
            kinds = TWO.modality_of(np.array(documents[one])).tolist()
            own = [(loss or one == query) and bool(BITS[one % 4] >> kind & 1) for kind in kinds]
            trained += [False, *own[1:]]
        trained += [False] * len(HOLES) + [bool(BITS[query % 4] & 1)]
        wanted = [trained[place] for place in rotation(len(plain), spans)]
        assert mask[:-1] == wanted[1:] and not mask[-1]
        queries.append(query)
        rotated += bool(spans)
        with_neighbours += bool(spans) and bool(before)
    assert sorted(queries) == list(range(DOCUMENTS))
    assert rotated > 30 and with_neighbours > 15


def test_the_masking_changes_no_neighbour(folder: Path, documents: list[list[int]]) -> None:
    """Which neighbours a document has does not depend on the masking."""

    def found(masking: Masking | None) -> set[tuple[int, ...]]:
        return {tuple(restored(ids, TWO)) for ids, _ in composites(mix(folder, masking))}

    assert found(Masking(0.7, "whole")) == found(None)


def test_each_epoch_has_other_spans_and_a_position_gives_the_same_batch(folder: Path) -> None:
    one, other = (mix(folder, Masking(0.9, "whole"), once=False) for _ in range(2))
    length = one.len_epoch()
    batches = [one.micro_batch(index).tokens for index in range(2 * length)]
    for index in (2 * length - 1, 1, length):
        np.testing.assert_array_equal(other.micro_batch(index).tokens, batches[index])
    assert not np.array_equal(np.sort(batches[0].ravel()), np.sort(batches[length].ravel()))


def config(folder: Path, order: str, rate: float, neighbours: int) -> Config:
    made = masked_config(folder, rate, kind="dense", seq_length=64)
    retrieval = made.data.retrieval.model_copy(update={"neighbours": neighbours})
    data = {"retrieval": retrieval, "order": order, "pack_window": 40, "deal_window": 16}
    return made.model_copy(update={"data": made.data.model_copy(update=data)})


# The rate and the number of neighbours before and after a resume within an epoch.
CHANGES = {
    "the rate": ((0.7, 2), (0.2, 2)),
    "the neighbours": ((0.7, 2), (0.7, 1)),
    "both": ((0.7, 1), (0.3, 2)),
    "both begin": ((0.0, 0), (0.7, 2)),
    "both end": ((0.7, 2), (0.0, 0)),
    "the neighbours begin": ((0.7, 0), (0.7, 2)),
    "the holes begin": ((0.0, 2), (0.7, 2)),
}


@pytest.mark.parametrize("order", list(DATA_ORDERS))
@pytest.mark.parametrize("change", CHANGES)
def test_after_changes_within_an_epoch_a_run_reads_what_it_has_not_read(
    folder: Path, documents: list[list[int]], change: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the new settings and back; then it resumes without a change."""
    monkeypatch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=20))
    before, after = CHANGES[change]
    read: Counter[int] = Counter()
    kept, segments, consumed = [], [], 0
    for rate, neighbours in (before, after, before, before):
        made = config(folder, order, rate, neighbours)
        place = resume_stream(
            made,
            open_mixture(made, "train", vocabulary=TWO),
            data=identities(made, read_blend(made)),
            consumed=consumed,
            step=consumed // 4,
            segments=segments,
        )
        first, segments = (consumed - place.mixture.start) // 2, place.segments
        queries, holes, several = [], 0, 0
        for number in range(first, first + 2):
            batch = place.mixture.micro_batch(number)
            for row, names in enumerate(batch.document_ids):
                for name in np.unique(names):
                    ids = batch.tokens[row, (names == name) & (batch.tokens[row] > 0)].tolist()
                    if ids:
                        plain = restored(ids, TWO)
                        starts = [*(n for n, token in enumerate(plain) if token == BOS), len(plain)]
                        queries.append(documents.index(plain[starts[-2] : starts[-1]]))
                        holes += plain != ids
                        several = max(several, len(starts) - 2)
        assert (holes > 0) is (rate > 0) and several <= neighbours and (several > 0) is (neighbours > 0)
        read.update(queries)
        kept.append(len(segments))
        consumed += 4
    assert kept == [1, 2, 3, 3]
    assert set(read.values()) == {1} and 25 < len(read) < DOCUMENTS
