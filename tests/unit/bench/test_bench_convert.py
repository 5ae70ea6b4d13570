"""`mmscale bench convert` on a tiny model: every figure is there and makes sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.bench import conversion
from mmscale.errors import UsageError
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks


def test_a_small_round(tmp_path: Path) -> None:
    def measure(ranks: RankEnv) -> None:
        result = conversion.run(
            hidden=64, layers=1, experts=2, repeats=2, batch=1, prompt=4, new_tokens=2, folder=str(tmp_path)
        )
        for name in ("convert_mb_per_s", "copy_mb_per_s", "convert_over_copy"):
            assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"]
        generate = result["generate"]
        assert generate["moma_tokens_per_s"]["min"] > 0 and generate["dense_tokens_per_s"]["min"] > 0
        assert generate["parameters"]["moma"] > generate["parameters"]["dense"]
        assert result["memory_mb"]["peak"] is None or result["memory_mb"]["peak"] < 100
        assert result["model"]["bytes"] == 4 * result["model"]["parameters"]
        text = conversion.render(result)
        assert "conversion, MB/s" in text and "largest tensor 4 MB" in text

    run_ranks(measure, world_size=1)
    assert list(tmp_path.iterdir()) == []


def test_options() -> None:
    with pytest.raises(UsageError, match="multiple of 64"):
        conversion.run(hidden=100)
