"""FP8 in a configuration: recipes and shapes that are refused, slots that are rounded up and said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from changed import changed
from typer.testing import CliRunner

from mmscale.cli import app
from mmscale.config import Config, ParallelConfig
from mmscale.config.derived import depth_tokens, for_inference, with_auxiliary_routers
from mmscale.config.precision.fp8 import capacity_multiple, depth_multiple, high_precision, roundings, row_multiple
from mmscale.config.rules import violations

BASE: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 61}]},
    "model": {
        "kind": "moma",
        "num_layers": 8,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 256,
        "experts": {"counts": {"text": 4, "image": 4}},
    },
    "precision": {"fp8": "tensorwise", "fp8_emulate": True},
}


def config(**changes: Any) -> Config:
    """BASE with dotted keys replaced; dots are written as double underscores."""
    return changed(BASE, changes)


BLOCKWISE = {"precision__fp8": "blockwise"}
MXFP8 = {"precision__fp8": "mxfp8"}
NVFP4 = {"precision__fp8": "nvfp4"}
BROKEN = [
    ({"precision__fp8": "off"}, "precision.fp8_emulate is set, but precision.fp8 = off"),
    ({"precision": {"fp8_skip_last": 1}}, "precision.fp8_skip_last is set, but precision.fp8 = off"),
    ({"precision__fp8": "delayed", "precision__fp8_skip_first": 1}, "do not go with precision.fp8 = delayed"),
    ({"precision__fp8_skip_first": 4, "precision__fp8_skip_last": 4}, "leave no layer in FP8 of 8"),
    ({"precision__fp8_skip_first": 5, "parallel__pp": 2}, "fp8_skip_first = 5 is more than the 4 layers of a pipeline"),
    ({"precision__fp8_margin": 9}, "scales would be 2^9 times too small"),
    ({"model__backend": "te"}, "precision.fp8_emulate with model.backend = te"),
    ({"model__experts__compute": "te"}, "precision.fp8_emulate with model.experts.compute"),
    ({"model__backend": "torch", "precision__fp8_emulate": False}, "only Transformer-Engine has FP8 kernels"),
    ({"model__experts__compute": "bmm", "precision__fp8_emulate": False}, "would stay in bf16"),
    ({"model__hidden_size": 136, "model__num_attention_heads": 2}, "model.hidden_size, 136 on a rank, is not a mult"),
    ({"model__ffn_hidden_size": 48, "parallel__tp": 2}, "model.ffn_hidden_size, 24 on a rank, is not a multiple of 16"),
    ({"model__kv_channels": 6}, "queries, keys and values, 72 on a rank"),
    ({"model__kv_channels": 6}, "attention's output, 24 on a rank"),
    (
        {"model__experts__shared": 1, "model__experts__shared_ffn_hidden_size": 24},
        "all shared experts together, 24 on a rank",
    ),
    ({"model__seq_length": 250}, "model.seq_length = 250 is not a multiple of 16"),
    ({"model__seq_length": 16, "parallel__tp": 2}, "= 8 rows, no multiple of 16"),
    (
        {**BLOCKWISE, "parallel__tp": 2, "model__hidden_size": 192},
        "192 on a rank, is not a multiple of 128",
    ),
    ({**BLOCKWISE, "parallel__tp": 2, "model__seq_length": 192}, "model.seq_length = 192 is not a multiple of 128"),
    (
        {**BLOCKWISE, "parallel__tp": 4},
        "precision.fp8 = blockwise with parallel.tp = 4: model.seq_length = 256, of which a rank holds 64",
    ),
    ({**MXFP8, "model__ffn_hidden_size": 48}, "model.ffn_hidden_size, 48 on a rank, is not a multiple of 32"),
    ({**MXFP8, "model__seq_length": 144}, "model.seq_length = 144 is not a multiple of 32"),
    ({**NVFP4, "model__ffn_hidden_size": 48}, "model.ffn_hidden_size, 48 on a rank, is not a multiple of 32"),
    ({**NVFP4, "model__seq_length": 192}, "model.seq_length = 192 is not a multiple of 128"),
    ({**NVFP4, "parallel__tp": 4}, "model.seq_length = 256, of which a rank holds 64"),
    ({**NVFP4, "precision__fp8_emulate": False, "precision__dtype": "fp32"}, "Hadamard rotation takes bf16"),
    ({**NVFP4, "precision__fp8_emulate": False, "precision__fp4_hadamard": False}, "megatron-core takes the recipe as"),
    (
        {**NVFP4, "parallel__tp": 2, "parallel__overlap_tensor": True, "precision__fp8_emulate": False},
        "user buffers carry no scales of blocks",
    ),
    ({"model__depth": {"capacity": 0.05}, "parallel__tp": 2}, "Mixture-of-Depths layer selects = 16, of which"),
]


@pytest.mark.parametrize(("changes", "cause"), BROKEN, ids=[cause[:40] for _, cause in BROKEN])
def test_refused_with_the_way_out(changes: dict[str, Any], cause: str) -> None:
    found = violations(config(**changes))
    assert any(cause in problem.cause and problem.remedy for problem in found), found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision__fp8_emulate": False},  # whether Transformer-Engine is here is asked where the model is built
        {"precision__fp8": "delayed", "precision__fp8_amax_history": 16, "precision__fp8_margin": 1},
        {**BLOCKWISE, "precision__fp8_skip_first": 1, "precision__fp8_skip_last": 1, "model__hidden_size": 144},
        {**BLOCKWISE, "parallel__tp": 2},
        {**MXFP8, "precision__fp8_skip_first": 1},
        {**MXFP8, "parallel__tp": 2},
        {**NVFP4, "precision__fp4_stochastic_rounding": False, "precision__fp4_hadamard": False},
        {**NVFP4, "parallel__tp": 2, "precision__fp8_emulate": False},
        {"parallel__tp": 2, "train__micro_batch_size": 2, "model__seq_length": 16},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    assert violations(config(**changes)) == []


def test_slots_are_rounded_to_what_products_take() -> None:
    depth = {"capacity": 0.3, "multiple": 4}
    off = config(model__depth=depth, precision={})
    assert (row_multiple(off), capacity_multiple(off), depth_multiple(off), depth_tokens(off)) == (1, 1, 4, 80)
    assert roundings(off) == []
    on = config(model__depth=depth)
    assert (row_multiple(on), capacity_multiple(on), depth_multiple(on), depth_tokens(on)) == (16, 16, 16, 80)
    wide = config(model__depth=depth, model__experts__capacity_multiple=24, parallel__tp=2, **BLOCKWISE)
    assert (row_multiple(wide), capacity_multiple(wide), depth_multiple(wide), depth_tokens(wide)) == (
        128,
        384,
        128,
        128,
    )
    assert roundings(on) == [
        "model.experts.capacity_multiple = 1 is taken as 16: precision.fp8 = tensorwise takes rows in multiples of 16",
        "model.depth.multiple = 4 is taken as 16: precision.fp8 = tensorwise takes rows in multiples of 16",
    ]
    assert roundings(wide)[0] == (
        "model.experts.capacity_multiple = 24 is taken as 384: precision.fp8 = blockwise takes rows in multiples of "
        "128 with parallel.tp = 2, and of 16 with tp = 1"
    )
    assert roundings(config(model__experts__capacity_multiple=32)) == []
    micro = config(model__depth=depth, **MXFP8)
    assert (row_multiple(micro), capacity_multiple(micro), depth_multiple(micro)) == (32, 32, 32)


def test_what_comes_after_training_has_the_same_slots_without_fp8() -> None:
    trained = config(model__depth={"multiple": 4}, precision__fp8_skip_first=1, precision__fp8_skip_last=2, **BLOCKWISE)
    for later in (high_precision(trained), with_auxiliary_routers(trained), for_inference(trained, tp=2)):
        assert later.precision.fp8 == "off"
        refused = [problem.cause for problem in violations(later, world_size=2)]
        wanted = ["model.auxiliary.mode = stage is"] if later.model.auxiliary.mode == "stage" else []
        assert [cause[:31] for cause in refused] == wanted, refused
        assert capacity_multiple(later) == capacity_multiple(trained) == 16
        assert depth_tokens(later) == depth_tokens(trained)


def test_inference_leaves_the_layout_and_the_machine_of_training() -> None:
    """What is left must be the model alone: the same on a machine without CUDA, and over any number of ranks."""
    there = {
        "model__backend": "te",
        "model__gradient_accumulation_fusion": "on",
        "parallel__tp": 2,
        "parallel__ep": 2,
    }
    fp8 = {**BLOCKWISE, "precision__fp8_emulate": False, "model__experts__compute": "te"}
    trained = config(**there, **fp8)
    graphs = config(
        **there,
        parallel__overlap_tensor=True,  # not with blockwise FP8
        precision={},
        model__experts__compute="grouped_mm",
        model__experts__cuda_graph=True,
    )
    assert violations(trained) == violations(graphs) == []
    for run in (trained, graphs):
        later = for_inference(run, tp=4)
        model = later.model
        assert (model.backend, model.experts.compute, model.experts.cuda_graph) == ("auto", "auto", False)
        assert model.gradient_accumulation_fusion == "off" and later.parallel == ParallelConfig(tp=4)
        assert capacity_multiple(later) == capacity_multiple(run)
        assert violations(later, world_size=4) == []
    assert for_inference(config(model__backend="torch")).model.backend == "torch"


def test_config_check_says_what_is_rounded(tmp_path: Path) -> None:
    file = tmp_path / "fp8.yaml"
    file.write_text(json.dumps(BASE))
    shown = CliRunner().invoke(app, ["config", "check", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "note: model.experts.capacity_multiple = 1 is taken as 16" in shown.output.replace("\n", " ")
    found = json.loads(CliRunner().invoke(app, ["config", "check", str(file), "--json"]).output)
    assert found["notes"] == roundings(config())
