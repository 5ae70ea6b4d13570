# mmscale/data/holes.py, stream/causal_masking.py and stream/as_read.py against a plain reference, for random documents.
"""Tests of causal masking (CM3)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.data.holes import MEAN_SPANS, hole_tokens, rotation
from mmscale.data.prepared import table_facts
from mmscale.data.prepared.identity import identities
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.prepared.share import nominal_share
from mmscale.data.stream.causal_masking import Masking, SpanChoice, token_runs
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import resume_stream
from mmscale.data.stream.source import Source
from mmscale.data.stream.table import DocumentRows
from mmscale.data.vocab import BOI, BOS, EOI, EOS, HOLES, RESERVED, Vocabulary
from mmscale.tables.settings import DATA_ORDERS, IMAGE_SPANS
from tests.unit.data.corpora import prepare

VOCABULARIES = [
    Vocabulary(("text",), ((0, 100),), reserved=True),
    Vocabulary(("text", "image"), ((0, 100), (100, 132)), reserved=True),
    Vocabulary(("text", "image", "audio"), ((0, 100), (100, 132), (132, 150)), marked=("audio",), reserved=True),
]
TWO = VOCABULARIES[1]
TOKENS = hole_tokens(TWO).tolist()
SEQ = 128
OPTIONS: dict[str, Any] = {"seq_length": SEQ, "micro_batch_size": 4, "seed": 3, "pack_window": 40, "deal_window": 16}


def random_document(rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
    """Text and items in any order, some of them without begin and end tokens; sometimes without text or `</s>`."""
    parts: list[Any] = [[BOS]]
    for _ in range(rng.integers(0, 5)):
        name = vocabulary.names[rng.integers(len(vocabulary.names))]
        first, end = vocabulary.range_of(name)
        first = len(vocabulary.specials) if name == "text" else first
        own = rng.integers(first, end, rng.integers(1, 20))
        marks = vocabulary.marks(name) if rng.random() < 0.9 else None
        parts += [own] if marks is None else [[marks[0]], own, [marks[1]]]
    return np.concatenate([*parts, [EOS] * bool(rng.random() < 0.9)]).astype(np.int64)


def rows_of(ids: np.ndarray, vocabulary: Vocabulary, *, masked: bool = False) -> DocumentRows:
    modality = vocabulary.modality_of(ids)
    counts = np.array([[(modality == m).sum() for m in range(len(vocabulary.names))]], np.int32)
    return DocumentRows(counts, np.array([7]), counts, np.array([masked]))


def restored(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """The document of a rotated one, found by its tokens alone."""
    *holes, end_of_fill = hole_tokens(vocabulary).tolist()
    if holes[0] not in ids:
        return ids
    moved = ids.index(holes[0], ids.index(holes[0]) + 1)
    body, rest, fillings = ids[:moved], ids[moved:], {}
    while rest:
        end = rest.index(end_of_fill)
        fillings[rest[0]], rest = rest[1:end], rest[end + 1 :]
    return [token for one in body for token in fillings.get(one, [one])]


def reference(ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The rotated document and which of its tokens are trained on as labels: CM3 as in its paper, in a plain loop."""
    *holes, end_of_fill = TOKENS
    out, labels, at = [], [], 0
    for i, (a, b) in enumerate(spans):
        out += [*ids[at:a], holes[i]]
        labels += [True] * (a - at) + [False]
        at = b
    out += ids[at:]
    labels += [True] * (len(ids) - at)
    for i, (a, b) in enumerate(spans):
        out += [holes[i], *ids[a:b], end_of_fill]
        labels += [False] + [True] * (b - a + 1)
    return out, [False, *labels[1:]]


@pytest.mark.parametrize("image_spans", list(IMAGE_SPANS))
@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda one: f"{len(one.names)} modalities")
def test_restoring_a_rotated_document_gives_the_document(vocabulary: Vocabulary, image_spans: str) -> None:
    """1,200 documents each: lengths from the table, spans apart, inside segments, items whole or untouched."""
    rng = np.random.default_rng(len(vocabulary.names))
    choice = SpanChoice(masking=Masking(1.0, image_spans), seed=1, source=0, seq_length=256)
    seen: Counter[str] = Counter()
    for document in range(1200):
        ids = random_document(rng, vocabulary)
        modality, epoch = vocabulary.modality_of(ids), document % 3
        number = int(choice.numbers(rows_of(ids, vocabulary), np.array([document]), np.array([epoch]))[0])
        segments = token_runs(ids, modality, vocabulary)
        spans = choice.spans(segments, number=number, document=document, epoch=epoch, end=len(ids) - 1)
        assert len(spans) == number and spans == sorted(spans)
        for start, stop in spans:
            inside = [one for one in segments if one.start <= start and stop <= one.stop]
            if start == stop:  # only if an item has no text around it
                assert image_spans == "none" and start == len(ids) - 1
                seen["empty"] += 1
            else:
                assert len(inside) == 1 and 0 < start < stop <= len(ids)
                seen["item" if inside[0].item else "text"] += 1
                if inside[0].item:
                    assert image_spans == "partial" or (start, stop) == (inside[0].start, inside[0].stop)
        for one, other in pairwise(spans):
            apart = any(one[1] == segment.stop for segment in segments) or one[0] == one[1] or other[0] == other[1]
            assert one[1] < other[0] or (apart and one[1] <= other[0])
        taken = np.append(ids, hole_tokens(vocabulary))[rotation(len(ids), spans)]
        assert len(taken) == len(ids) + 3 * number
        assert restored(taken.tolist(), vocabulary) == ids.tolist()
        marks = [mark for name in vocabulary.names for mark in vocabulary.marks(name) or ()]
        moved = {place for start, stop in spans for place in range(start, stop)}
        assert not any(ids[place] in marks for place in moved)
    assert seen["text"] > 300
    assert (seen["item"] > 100) is (len(vocabulary.names) > 1 and image_spans != "none")


def test_spans_are_as_many_and_as_long_as_in_the_paper() -> None:
    """Clamp(Poisson(1), 1, 16) spans; a single one covers a third of the document in the mean."""
    ids = np.concatenate([[BOS], np.full(498, 60), [EOS]])
    rows, choice = rows_of(ids, TWO), SpanChoice(masking=Masking(0.5, "whole"), seed=5, source=2, seq_length=4096)
    many = np.arange(100_000)
    repeated = DocumentRows(*(np.repeat(getattr(rows, f.name), len(many), axis=0) for f in dataclasses.fields(rows)))
    numbers = choice.numbers(repeated, many, np.zeros_like(many))
    assert abs((numbers > 0).mean() - 0.5) < 0.01
    of_masked = numbers[numbers > 0]
    assert abs(of_masked.mean() - MEAN_SPANS) < 0.01
    assert abs((of_masked == 1).mean() - 2 / np.e) < 0.01 and abs((of_masked == 2).mean() - 0.5 / np.e) < 0.01
    segments = token_runs(ids, TWO.modality_of(ids), TWO)
    single = [choice.spans(segments, number=1, document=d, epoch=0, end=499)[0] for d in range(2000)]
    assert abs(np.mean([stop - start for start, stop in single]) / 498 - 1 / 3) < 0.02
    for change in ({"seed": 6}, {"source": 1}):
        other = dataclasses.replace(choice, **change).numbers(repeated, many, np.zeros_like(many))
        assert ((other > 0) == (numbers > 0)).mean() < 0.6
    later = choice.numbers(repeated, many, np.ones_like(many))
    assert ((later > 0) == (numbers > 0)).mean() < 0.6


def test_a_document_without_room_is_read_as_it_is() -> None:
    choice = SpanChoice(masking=Masking(1.0, "whole"), seed=0, source=0, seq_length=64)

    def numbers(ids: list[int], **facts: bool) -> int:
        return int(choice.numbers(rows_of(np.array(ids), TWO, **facts), np.array([0]), np.array([0]))[0])

    assert numbers([BOS, EOS]) == numbers([BOS]) == 0
    assert numbers([BOS, 60, EOS]) == numbers([BOS, BOI, *[110] * 20, EOI, EOS]) == 1
    assert numbers([BOS, *[60] * 60, EOS]) == 0  # 65 tokens with a hole
    assert numbers([BOS, *[60] * 59, EOS]) == 1
    assert numbers([BOS, *[60] * 20, EOS], masked=True) == 0  # a conversation


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    made = []
    for number in range(90):
        name = [60 + number // 30, 70 + number % 30]  # tells documents apart
        image = [BOI, *rng.integers(100, 132, 16), EOI] if number % 2 else []
        made.append(np.array([BOS, *name, *rng.integers(60, 100, rng.integers(0, 30)), *image, EOS]))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]) -> Path:
    bits = [[3, 3, 1, 2][number % 4] for number in range(len(documents))]
    return prepare(tmp_path_factory.mktemp("masked") / "set", documents, vocabulary=TWO, loss=bits)


def mix(folder: Path, **options: Any) -> Mixture:
    source = Source(folder, split="train", vocabulary=TWO)
    return Mixture([source], TWO, **{**OPTIONS, "masking": Masking(0.5, "partial"), **options})


@pytest.mark.parametrize("order", list(DATA_ORDERS))
@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_hold_rotated_documents(
    folder: Path, documents: list[np.ndarray], order: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document once in a pass, rotated as the reference does; masks and counts agree with the tables."""
    monkeypatch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=20))
    monkeypatch.setattr(table_facts, "LARGE", 20)
    mixture = mix(folder, order=order, document_multiple=multiple, once=True)
    modalities = TWO.modality_of(np.arange(132))
    found, rotated = [], 0
    for index in range(mixture.len_epoch()):
        batch = mixture.micro_batch(index)
        assert batch.counts == tuple((batch.modality_ids == m).sum() for m in range(2)) == mixture.counts(index)
        labels = TWO.modality_of(batch.labels)
        assert batch.label_counts == tuple(int(batch.loss_mask[labels == m].sum()) for m in range(2))
        for row, numbers in enumerate(batch.document_ids):
            for number in np.unique(numbers):
                own = np.flatnonzero(numbers == number)
                ids = batch.tokens[row, own]
                ids = ids[ids > 0].tolist()
                if not ids:
                    continue
                plain = restored(ids, TWO)
                place = (plain[1] - 60) * 30 + plain[2] - 70 if len(plain) > 2 else -1
                assert plain == documents[place].tolist()
                found.append(place)
                rotated += ids != plain
                spans, at, holes = [], 0, [token for token in TOKENS[:-1] if token in ids]
                for hole in holes:  # the spans from the rotated document itself
                    first, again = (n for n, token in enumerate(ids) if token == hole)
                    size = ids[again:].index(TOKENS[-1]) - 1
                    at = first + sum(stop - start - 1 for start, stop in spans)
                    spans.append((at, at + size))
                expected, trained = reference(plain, spans)
                assert ids == expected
                bits = [3, 3, 1, 2][place % 4]
                wanted = [t and bool(bits >> modalities[token] & 1) for t, token in zip(trained, ids, strict=True)]
                mask = batch.loss_mask[row, own] > 0
                assert mask[: len(ids) - 1].tolist() == wanted[1:] and not mask[len(ids) - 1 :].any()
    assert sorted(found) == list(range(len(documents)))
    assert 20 < rotated < 70


def test_each_epoch_has_other_spans_and_a_position_gives_the_same_batch(folder: Path) -> None:
    one, other = mix(folder, micro_batch_size=1), mix(folder, micro_batch_size=1)
    first = {index: one.micro_batch(index).tokens for index in range(60)}
    for index in (59, 3, 40):
        np.testing.assert_array_equal(other.micro_batch(index).tokens, first[index])
    by_epoch: dict[int, dict[int, tuple[int, ...]]] = {}
    for index in range(60):
        ((_, numbers, epochs),) = one._rows(index)
        read = one.streams[0].reader.read(numbers, epochs, vocabulary=TWO)
        parts = np.split(read.ids, np.cumsum(read.lengths)[:-1])
        for number, epoch, ids in zip(numbers.tolist(), epochs.tolist(), parts, strict=True):
            by_epoch.setdefault(epoch, {})[number] = tuple(ids.tolist())
    assert len(by_epoch) > 2
    both = by_epoch[0].keys() & by_epoch[1].keys()
    assert len(both) == 90
    assert 30 < sum(by_epoch[0][number] != by_epoch[1][number] for number in both) < 85


def test_without_causal_masking_nothing_changes(folder: Path) -> None:
    plain = mix(folder, masking=None)
    assert not np.isin(plain.micro_batch(0).tokens, TOKENS).any()
    assert len(HOLES) + 6 == len(RESERVED)


def config(folder: Path, rate: float, **model: Any) -> Config:
    text, image = ({"name": name, "size": size} for name, size in (("text", 100), ("image", 32)))
    shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "seq_length": SEQ}
    return Config.model_validate(
        {
            "vocab": {"modalities": [text, image], "reserved": True},
            "model": {**shape, **(model or {"kind": "dense"})},
            "data": {"path": str(folder)},
            "train": {"micro_batch_size": 2, "global_batch_size": 4},
            "objective": {"cm3_rate": rate},
        }
    )


def test_after_a_change_of_the_rate_a_run_reads_what_it_has_not_read(folder: Path) -> None:
    read, consumed, kept, segments = Counter(), 0, [], []
    for rate, steps in ((0.0, 2), (0.7, 2), (0.7, 3), (0.0, 6)):
        made = config(folder, rate)
        older = [{key: value for key, value in one.items() if value or key != "masking"} for one in segments]
        place = resume_stream(
            made,
            open_mixture(made, "train", vocabulary=TWO),
            data=identities(made, read_blend(made)),
            consumed=consumed,
            step=consumed // 4,
            segments=older,
        )
        first, segments = (consumed - place.mixture.start) // 2, place.segments
        for number in range(first, first + 2 * steps):
            assert np.isin(place.mixture.micro_batch(number).tokens, TOKENS).any() <= (rate > 0)
            for _, documents in place.mixture.documents(number):
                read.update(documents.tolist())
        kept.append(len(segments))
        consumed += 4 * steps
    assert kept == [1, 2, 2, 3]
    assert max(read.values()) - min(read[document] for document in range(90)) <= 1


def test_held_out_documents_are_read_as_they_are(folder: Path) -> None:
    made = config(folder, 1.0)
    assert np.isin(open_mixture(made, "train", vocabulary=TWO).micro_batch(0).tokens, TOKENS).any()
    held_out = open_mixture(made, "train", vocabulary=TWO, folder=folder)  # a pass, as of an evaluation
    assert not any(np.isin(held_out.micro_batch(n).tokens, TOKENS).any() for n in range(held_out.len_epoch()))


def test_shares_count_the_tokens_of_holes(folder: Path) -> None:
    counts = np.zeros(2)
    mixture = mix(folder, masking=Masking(1.0, "whole"), once=True)
    for index in range(mixture.len_epoch()):
        counts += mixture.counts(index)
    experts = {"kind": "moma", "experts": {"counts": {"text": 2, "image": 2}}}
    plain, masked = (nominal_share(config(folder, rate, **experts))["text"] for rate in (0.0, 1.0))
    assert abs(masked - counts[0] / counts.sum()) < 0.01 < masked - plain
