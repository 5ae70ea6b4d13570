"""Questions in micro-batches: their counts are those of the micro-batch, and nothing is packed for them."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.data.stream import asked
from mmscale.data.stream.asked import Asked, PackedQuestions
from tests.unit.data.corpora import THREE


def test_counts_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(5, THREE.size, length).tolist()) for length in (3, 9, 14, 2, 30, 7)]
    questions = PackedQuestions([Asked(one, len(one) - 1) for one in ids], vocabulary=THREE, seq_length=32, rows=2)
    modalities = range(len(THREE.names))
    wanted = [
        [[int((row == m).sum()) for m in modalities] for row in questions.micro_batch(index).modality_ids]
        for index in range(len(questions))
    ]
    assert len(questions) > 1 and sum(map(sum, wanted[0])) > 0
    monkeypatch.setattr(asked, "pack_rows", None)
    assert [questions.sequence_counts(index).tolist() for index in range(len(questions))] == wanted
