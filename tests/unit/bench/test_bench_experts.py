"""The benchmark of ways to compute experts: what runs, that all of it is the same function, and its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmscale.bench import experts
from mmscale.errors import UsageError


def test_a_small_run() -> None:
    result = experts.run(hidden=16, ffn=24, experts=2, rows=8, repeats=2)
    assert set(result["ways"]) == {"floor", "loop", "bmm", "bmm_fused", "grouped_mm", "grouped_mm_fused"}
    assert result["fastest"] in result["ways"] and result["fastest"] != "floor"
    for name, found in result["ways"].items():
        for part, times in (("forward", 1), ("training", 3)):
            seconds, tflops = found[part]["seconds"], found[part]["tflops"]
            assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
            # 2 experts x 8 rows x (16 x 48 + 24 x 16) products and sums, three times that with backward.
            assert tflops["max"] * seconds["min"] * 1e12 == pytest.approx(times * 2 * 16 * (16 * 48 + 24 * 16))
            assert name != "bmm" or found[part]["over_bmm"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    text = experts.render(result)
    assert "2 experts x 8 rows" in text and "| grouped_mm_fused |" in text


def test_all_ways_are_the_same_function() -> None:
    shape = experts.ExpertShape(3, 5, 16, 8)
    given = experts.inputs(shape, torch.float32)
    outputs = {name: way(*given) for name, way in experts.ways(shape, torch.float32).items() if name != experts.FLOOR}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["loop"], msg=lambda text, name=name: f"{name}: {text}")


def test_grouped_mm_is_left_out_where_its_kernels_refuse() -> None:
    assert "grouped_mm" not in experts.ways(experts.ExpertShape(2, 4, 16, 7), torch.float32)


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"rows": 0}, {"repeats": "many"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="bench experts"):
        experts.run(**options)
