"""Questions in micro-batches: their counts are those of the micro-batch, and nothing is packed for them."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.data.stream import answer_requests
from mmscale.data.stream.answer_requests import AnswerRequest, PackedQuestions
from mmscale.data.stream.context_rows import ContextRows, zigzag
from tests.unit.data.corpora import THREE


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_counts_of_sequences(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(5, THREE.size, length).tolist()) for length in (3, 9, 14, 2, 30, 7)]
    questions = PackedQuestions(
        [AnswerRequest(one, len(one) - 1) for one in ids], vocabulary=THREE, seq_length=32, rows=2, multiple=multiple
    )
    modalities = range(len(THREE.names))
    wanted = [
        [[int((row == m).sum()) for m in modalities] for row in questions.micro_batch(index).modality_ids]
        for index in range(len(questions))
    ]
    assert len(questions) > 1 and sum(map(sum, wanted[0])) > 0
    monkeypatch.setattr(answer_requests, "pack_rows", None)
    assert [questions.sequence_counts(index).tolist() for index in range(len(questions))] == wanted


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_requested_token_is_read_at_its_place_by_one_rank(size: int) -> None:
    rng = np.random.default_rng(1)
    ids = [tuple(rng.integers(5, THREE.size, length).tolist()) for length in (3, 9, 14, 30, 7, 12)]
    starts = [1, 4, 13, 20, 2, 11]
    questions = PackedQuestions(
        [AnswerRequest(one, start) for one, start in zip(ids, starts, strict=True)],
        vocabulary=THREE,
        seq_length=32,
        rows=2,
        multiple=8,
    )
    found: list[tuple[int, int, int]] = []  # document, token before the requested one, requested token
    for index in range(len(questions)):
        whole, wanted = questions.micro_batch(index), questions.wanted(index)
        for rank in range(size):
            context = None if size == 1 else ContextRows(zigzag(whole.document_ids, size=size), rank, size)
            own = wanted.of_rank(context)
            tokens = whole.tokens if context is None else np.take_along_axis(whole.tokens, context.own, axis=1)
            before = tokens[own.rows, own.positions]
            found += zip(own.asked.tolist(), before[own.places].tolist(), own.tokens.tolist(), strict=True)
    assert sorted(found) == sorted(
        (number, one[at - 1], one[at])
        for number, (one, start) in enumerate(zip(ids, starts, strict=True))
        for at in range(start, len(one))
    )
