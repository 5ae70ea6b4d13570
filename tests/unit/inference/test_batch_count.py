"""The places that a long evaluation shows."""

from __future__ import annotations

from mmscale.inference.batch_count import counted


def test_batches_are_counted_to_their_number() -> None:
    """The last call comes after the last batch, before the results of ranks are added up."""
    places: list[str] = []
    on_batch = counted(places.append, "causal routing, batch", 2)
    for _ in range(3):
        on_batch()
    assert places == ["causal routing, batch 1 of 2", "causal routing, batch 2 of 2"]
    counted(places.append, "questions, batch")()
    assert places[-1] == "questions, batch 1"
