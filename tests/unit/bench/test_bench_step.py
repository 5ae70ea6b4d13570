# mmscale/bench/step.py: the comparison that docs/results/step_time.md quotes, on tiny shapes; no assertion on time.
"""Tests of the step benchmark."""

from __future__ import annotations

import json

import pytest

from mmscale.bench import operators
from mmscale.bench.step import PAPER, PEER, VARIANTS, render, run, variant_config
from mmscale.errors import UsageError
from mmscale.plan import flops_per_token

TINY = {"hidden": 64, "seq": 64, "layers": 4, "micro_batch": 2, "tokens_per_step": 256}


@pytest.mark.parametrize(
    "shape",
    [{**TINY, "dtype": "fp32"}, {**TINY, "hidden": 512, "seq": 1024, "tokens_per_step": 16_384, "dtype": "bf16"}],
)
def test_variants_have_equal_flops_per_token(shape: dict[str, object]) -> None:
    configs = {name: variant_config(name, **shape) for name in VARIANTS if name != PEER}  # type: ignore[arg-type]
    dense = flops_per_token(configs["dense"]).forward
    for name, config in configs.items():
        assert flops_per_token(config).forward == pytest.approx(dense, rel=0.03), name
    assert configs["4t4i_mod"].model.num_layers > configs["4t4i"].model.num_layers == configs["dense"].model.num_layers


@pytest.mark.long
def test_a_run_reports_every_variant_and_its_profile() -> None:
    pytest.importorskip("transformers")
    result = run(**TINY, repeats=2, profile=True)  # type: ignore[arg-type]
    assert tuple(result["variants"]) == VARIANTS
    for name, found in result["variants"].items():
        assert found["paper"] == PAPER.get(name)
        for times in (found["seconds"], found["throughput_over_dense"]):
            for clocks in times.values():
                for values in clocks.values():
                    assert 0 < values["min"] <= values["median"] <= values["max"]
    dense = result["variants"]["dense"]["throughput_over_dense"]
    assert dense["step"]["wall"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    for profile in result["profile"].values():
        assert profile["kinds"]["matmul"]["seconds"] > 0
        assert sum(one["share"] for one in profile["kinds"].values()) == pytest.approx(1.0)
    text = render(result)
    assert all(f"| {name} |" in text for name in VARIANTS) and "| matmul |" in text
    json.dumps(result)


def test_dense_is_always_measured_for_the_ratios() -> None:
    assert tuple(run(**TINY, repeats=1, variants="moe8x")["variants"]) == ("dense", "moe8x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"variants": ("moe9x",)}, "no variant is called moe9x"), ({"tokens_per_step": 100}, "multiple")],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(**{**TINY, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::bmm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::index_select", "gather and scatter"),
        ("aten::sort", "choice"),
        ("aten::_fused_rms_norm", "norm"),
        ("aten::copy_", "copies"),
        ("aten::mul", "elementwise and rest"),
    ],
)
def test_operators_are_told_apart(operator: str, kind: str) -> None:
    assert operators.kind(operator) == kind
