"""megatron-core's fields for FP8 and NVFP4 with Transformer-Engine, and what is refused without it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from mmscale.errors import ConfigError
from mmscale.model.build import transformer_config
from mmscale.model.fp8_settings import fp8_settings
from mmscale.runtime import transformer_engine
from tests.unit.model.test_fp8_emulate import config


def test_fp8_without_transformer_engine_is_an_error() -> None:
    """megatron-core would train in bf16 without a word."""
    asked = config("dense", precision={"fp8_emulate": False, "dtype": "bf16"})
    with pytest.raises(ConfigError, match=r"precision\.fp8 = tensorwise needs Transformer-Engine") as raised:
        transformer_config(asked)
    assert "precision.fp8_emulate=true" in raised.value.remedy


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
def test_a_recipe_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(transformer_engine, "problem", lambda: None)
    hopper = {f"is_{recipe}_available": lambda return_reason: (False, "compute capability 10.0 or higher is required")}
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(**hopper))
    asked = config("dense", precision={"fp8": recipe, "fp8_emulate": False, "dtype": "bf16"})
    with pytest.raises(ConfigError, match=rf"precision\.fp8 = {recipe} cannot run here: compute capability") as raised:
        transformer_config(asked)
    assert "precision.fp8=blockwise" in raised.value.remedy and recipe.upper() in raised.value.remedy
    assert transformer_engine.blackwell_problem("blockwise") is None


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fields_of_megatron_core(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """Where Transformer-Engine is; megatron-core itself accepts what is set."""
    monkeypatch.setattr(transformer_engine, "problem", lambda: None)
    monkeypatch.setattr(transformer_engine, "blackwell_problem", lambda recipe: None)
    skip = {} if recipe == "delayed" else {"fp8_skip_first": 1}
    precision = {"dtype": "bf16", "fp8": recipe, "fp8_emulate": False, "fp8_margin": 1, "fp8_amax_history": 16, **skip}
    asked = config("dense", precision=precision)
    fields = fp8_settings(asked)
    assert fields == {
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "fp8_margin": 1,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
        "fp8_wgrad": True,
        "tp_only_amax_red": False,
        "first_last_layers_bf16": recipe != "delayed",
        "num_layers_at_start_in_bf16": len(skip),
        "num_layers_at_end_in_bf16": 0,
    }
    made = transformer_config(asked)
    assert {name: getattr(made, name) for name in fields} == fields
    assert fp8_settings(config("dense")) == {}, "emulation must not look like FP8 to megatron-core"


def test_fields_of_megatron_core_for_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "problem", lambda: None)
    monkeypatch.setattr(transformer_engine, "blackwell_problem", lambda recipe: None)
    asked = config(
        "dense", precision={"dtype": "bf16", "fp8": "nvfp4", "fp8_emulate": False, "fp8_skip_last": 1}, num_layers=4
    )
    made = transformer_config(asked)
    assert (made.fp4, made.fp4_recipe, made.fp8) == ("e2m1", "nvfp4", None)
    assert made.first_last_layers_bf16 and made.num_layers_at_end_in_bf16 == 1
