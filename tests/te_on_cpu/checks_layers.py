"""Transformer-Engine's layers against the torch backend's: classes, losses and gradients, FP8."""

from __future__ import annotations

from pathlib import Path

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import compare
from tests.distributed.layouts import assert_equal, config, trace
from tests.distributed.test_resume import start
from tests.support import run_ranks
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.over_te import can_run, small, using  # noqa: F401  a fixture


def test_models_train_as_with_the_torch_backend() -> None:
    def ranks_of_one(ranks: RankEnv) -> None:
        start(ranks)
        for model in ("moma_post_per_expert_shared", "dense_depth_first"):
            found = {name: trace(using(config(model), name), ranks) for name in ("torch", "te")}
            assert_equal(found["torch"], found["te"], model)

    run_ranks(ranks_of_one, world_size=1)


def test_slots_hold_the_classes_of_the_backend(tmp_path: Path) -> None:
    from mmscale.model.attention_te import FusedDocumentAttention
    from mmscale.model.experts_te import TEExperts
    from mmscale.model.linear_te import Norm, NormColumnLinear, RowLinear

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        made = using(config("moma", dtype="bf16"), "te")
        layer = build_chunks(made, groups)[0].decoder.layers[0]
        assert type(layer.self_attention.linear_qkv) is NormColumnLinear
        assert type(layer.self_attention.linear_proj) is RowLinear
        assert type(layer.self_attention.core_attention) is FusedDocumentAttention
        assert type(layer.self_attention.q_layernorm) is type(layer.pre_mlp_layernorm) is Norm
        assert all(type(experts) is TEExperts for experts in layer.mlp.experts.values())
        # The layers add gradients by themselves; megatron-core's output layer would refuse without apex.
        assert layer.self_attention.linear_qkv.fuse_wgrad_accumulation
        assert layer.mlp.experts["text"].linear_fc1.fuse_wgrad_accumulation
        assert not transformer_config(made).gradient_accumulation_fusion

    run_ranks(one, world_size=1)


def test_every_recipe_trains_near_bf16() -> None:
    """The quantised losses are others than those of bf16, and near them; kernels of FP8 are called."""

    def one(ranks: RankEnv) -> None:
        start(ranks)
        made = small(config("moma", dtype="bf16"), num_layers=2)
        plain = trace(using(made, "te"), ranks)
        for recipe in RECIPES:
            CALLS.clear()
            loss, norm = compare(plain, trace(using(made, "te", fp8=recipe), ranks))
            assert 0.0 < loss < 0.02 and norm < 0.05, (recipe, loss, norm)
            assert CALLS["quantize"] + CALLS["split_quantize"] > 100, (recipe, CALLS)

    run_ranks(one, world_size=1)
