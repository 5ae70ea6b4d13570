"""Settings without effect are named: each row of the table, where what it needs is there and where it is not."""

from __future__ import annotations

from typing import Any

import pytest
from changed import changed

from mmscale.config import Config, keys
from mmscale.config.load import flatten, resolve
from mmscale.config.notes import NEEDS, notes, unused
from mmscale.config.rules import violations

BASE: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 64}]},
    "model": {
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "seq_length": 256,
        "experts": {"counts": {"text": 4, "image": 4}},
    },
    "data": {"prepare": {"source": "documents", "documents": ["a.jsonl"]}},
}
DENSE = {"model__kind": "dense", "model__experts__counts": {}}
# For each setting: a value that is not its default, what makes it useless, what makes it count.
ROWS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    **{
        f"{section}.{key}": (value, {f"{section.replace('.', '__')}__schedule": without}, {
            f"{section.replace('.', '__')}__schedule": needed
        })
        for section in ("optim", "auxiliary.optim", "sft.optim")
        for key, value, without, needed in (
            ("decay", 10, "cosine", "wsd"),
            ("power_exponent", -0.3, "wsd", "power"),
            ("power_tokens", 2e9, "linear", "power"),
            ("min_lr", 1e-5, "constant", "inverse_sqrt"),
            ("schedule_args", {"a": 1}, "cosine", "package.module:Schedule"),
        )
    },
    **{
        f"{section}.optimizer_args": ({"a": 1}, {}, {
            f"{section.replace('.', '__')}__optimizer": "package.module:Optimizer"
        })
        for section in ("optim", "auxiliary.optim", "sft.optim")
    },
    **{
        f"optim.muon.{key}": (value, {}, {"optim__optimizer": "muon"})
        for key, value in (
            ("momentum", 0.9),
            ("nesterov", False),
            ("steps", 3),
            ("coefficients", (2.0, -1.5, 0.5)),
            ("rms", 0.3),
            ("dtype", "bf16"),
        )
    },
    "train.loss_args": ({"a": 1}, {}, {"train__loss": "package.module:Loss"}),
    **{
        f"auxiliary.{key}": (8, {"model__auxiliary__mode": "joint"}, {})
        for key in ("steps", "micro_batch_size", "global_batch_size", "checkpoint_every")
    },
    "parallel.recompute_modules": (("mlp",), {}, {"parallel__recompute": "selective"}),
    "parallel.cp_attention": ("ring", {}, {"parallel__cp": 2, "data__document_multiple": 4}),
    "parallel.overlap_p2p": (True, {}, {"parallel__pp": 2, "parallel__vpp": 2}),
    "parallel.batch_p2p": (True, {}, {"parallel__pp": 2}),
    "model.experts.capacity_factor": (0.5, DENSE, {}),
    "model.experts.capacity_multiple": (8, DENSE, {}),
    "model.experts.scope": ("micro_batch", DENSE, {}),
    "model.experts.compute": ("bmm", DENSE, {}),
    "model.experts.fused_swiglu": (True, DENSE, {}),
    "model.experts.shared_ffn_hidden_size": (32, {}, {"model__experts__shared": 1}),
    **{
        f"model.rope_scaling.{key}": (value, {"model__rope_scaling__rope_type": useless}, {
            "model__rope_scaling__rope_type": counts
        })
        for key, value, useless, counts in (
            ("low_freq_factor", 2.0, "yarn", "llama3"),
            ("high_freq_factor", 2.0, "linear", "llama3"),
            ("original_max_position_embeddings", 64, "linear", "yarn"),
            ("beta_fast", 16.0, "llama3", "yarn"),
            ("beta_slow", 2.0, "linear", "yarn"),
            ("attention_factor", 1.5, "llama3", "yarn"),
            ("truncate", False, "linear", "yarn"),
        )
    },
    "precision.fp8_format": ("e4m3", {"precision__fp8": "nvfp4"}, {"precision__fp8": "tensorwise"}),
    "precision.fp4_stochastic_rounding": (False, {"precision__fp8": "mxfp8"}, {"precision__fp8": "nvfp4"}),
    "precision.fp4_hadamard": (False, {}, {"precision__fp8": "nvfp4"}),
    "precision.fp8_margin": (1, {"precision__fp8": "blockwise"}, {"precision__fp8": "delayed"}),
    "precision.fp8_amax_history": (16, {}, {"precision__fp8": "delayed"}),
    "precision.fp8_amax_choice": ("most_recent", {"precision__fp8": "tensorwise"}, {"precision__fp8": "delayed"}),
    "checkpoint.deadline": (60.0, {"checkpoint__asynchronous": False}, {}),
    "resilience.anomaly.skip_window": (50, {"resilience__anomaly__action": "skip"}, {
        "resilience__anomaly__action": "rollback"
    }),
    "resilience.anomaly.budget": (5, {}, {"resilience__anomaly__action": "skip"}),
    "resilience.memory_group": (2, {}, {"resilience__memory_every": 5}),
    "resilience.memory_hold": (60.0, {}, {"resilience__memory_every": 5}),
    "log.prometheus_address": ("127.0.0.1", {}, {"log__prometheus_port": 9000}),
    "data.prepare.image.patch": (16, {"data__prepare__image__kind": "vq", "data__prepare__image__path": "x"}, {}),
    "data.prepare.image.residual": (16, {"data__prepare__image__kind": "vq", "data__prepare__image__path": "x"}, {}),
    "data.prepare.image.fit_patches": (9, {"data__prepare__image__kind": "vq", "data__prepare__image__path": "x"}, {}),
    "data.prepare.image.path": ("x", {"data__prepare__image__kind": "levels", "data__prepare__image__size": 4}, {}),
    "data.prepare.image.kind_args": ({"a": 1}, {}, {"data__prepare__image__kind": "package.module:Codes"}),
    "data.prepare.text.kind_args": ({"a": 1}, {}, {"data__prepare__text__kind": "package.module:Words"}),
}  # fmt: skip
TABLE = {f"{need.section}.{key}": need for need in NEEDS for key in need.keys}


def test_every_row_of_the_table_is_a_setting_and_tested() -> None:
    assert set(TABLE) == set(ROWS)
    assert set(TABLE) <= set(keys.all_keys())


@pytest.mark.parametrize("key", TABLE)
def test_a_setting_without_effect_is_named(key: str) -> None:
    value, useless, counts = ROWS[key]
    name = key.replace(".", "__")
    for changes, expected in ((useless, True), (counts, False)):
        config = changed(BASE, changes | {name: value})
        assert violations(config) == [] or "fp8" in str(changes), violations(config)
        line = f"{key} has no effect: it needs {TABLE[key].words}"
        assert (line in notes(config)) is expected
        assert not any(key in note for note in unused(changed(BASE, changes)))


def test_defaults_are_never_named() -> None:
    for changes in ({}, DENSE, {"optim__schedule": "constant"}, {"model__auxiliary__mode": "joint"}):
        assert unused(changed(BASE, changes)) == []


def test_a_written_configuration_says_the_same(tmp_path: Any) -> None:
    config = changed(BASE, {"optim__decay": 5, "parallel__overlap_p2p": True})
    assert len(unused(config)) == 2
    assert unused(resolve(config.model_dump())) == unused(config)
    assert isinstance(config, Config) and flatten(config)["optim.decay"] == 5
