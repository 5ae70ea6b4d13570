# mmscale/bench/data.py: the comparison that docs/results/packing.md quotes, on a small corpus; no assertion on time.
"""Tests of the data benchmark."""

from __future__ import annotations

from mmscale.bench.data import run


def test_the_comparison_shows_what_packing_and_dealing_are_worth() -> None:
    result = run(documents=6000, repeats=1, micro_batches=3)
    chunked, packed, dealt = (result[scheme] for scheme in ("concat_and_chunk", "best_fit", "pack_then_deal"))
    assert chunked["images_cut"] > 0.15
    assert packed["images_cut"] == dealt["images_cut"] == 0
    assert chunked["padding"] == 0
    assert packed["padding"] == dealt["padding"] < 0.03
    for size in (4, 8):
        spread, best = packed["micro_batch"][size], dealt["micro_batch"][size]
        assert best["image_share_std"] < 0.35 * spread["image_share_std"]
        assert best["image_tokens_over_capacity"] < 0.5 * spread["image_tokens_over_capacity"]
    assert 0 < result["read_ms"]["min"] <= result["read_ms"]["median"] <= result["read_ms"]["max"]
