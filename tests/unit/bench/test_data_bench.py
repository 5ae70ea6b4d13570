# mmscale/bench/data.py: the comparison that docs/results/packing.md quotes, on a small corpus; no assertion on time.
"""Tests of the data benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.bench import data_start
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


def test_the_start_is_measured_on_linked_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_start, "_BASE", 200)
    made = data_start._make(tmp_path, 3, 4096)
    assert made.splits["train"].documents == 600 and (tmp_path / "train-000002.bin").stat().st_nlink == 3
    found, whole = (data_start._measure(tmp_path, 4096, 1, 2, order) for order in ("blocks", "epochs"))
    for one in (found, whole):
        assert one["peak_mb"] >= one["imports_mb"] > 0 and one["sequences_of_a_block"] > 0
    shown = data_start.render(
        {"documents": 600, "parts": 3, "tables_cpu_s": 0.1, "blocks": 6, "processes": 2}
        | dict.fromkeys(("first", "count", "random", "resume"), found)
        | {"pass": whole | {"documents": 600}}
    )
    assert shown.splitlines()[0].startswith("600 documents in 3 parts") and "| resume, counts kept |" in shown
    assert "`data.order: epochs`, 600 documents: " in shown.splitlines()[-1]
