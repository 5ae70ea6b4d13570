"""From a configuration to a model: parameter counts, layout of the parameters, what megatron-core is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config, ExpertsConfig
from mmscale.config.load import load
from mmscale.errors import ConfigError
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.layer import DepthLayer, MixedModalLayer
from mmscale.model.moma import MoMaMLP
from mmscale.model.norm import Residual, RMSNorm
from mmscale.model.spec import depth_settings, moma_settings
from mmscale.plan import plan
from tests.unit.model.reference import SHARE, depth, moma_experts, tiny

CONFIGS = Path(__file__).parents[3] / "configs"
NORMS = ("pre", "post", "post_per_expert")
# One tiny model for each kind of shipped configuration and for each setting that changes the number of parameters.
SHAPES: dict[str, Config] = {
    **{f"{kind}_{norm}": tiny(kind, norm=norm) for kind in ("dense", "moe", "moma") for norm in NORMS},
    **{
        f"mod_{kind}_{norm}": tiny(kind, norm=norm, depth=depth())
        for kind in ("dense", "moe", "moma")
        for norm in NORMS
    },
    **{f"shared_{norm}": tiny(norm=norm, experts=moma_experts(shared=2)) for norm in NORMS},
    "narrow_shared": tiny(experts=moma_experts(shared=3, shared_ffn_hidden_size=5)),
    "plain_attention": tiny(qk_norm=False),
    "plain_dense_attention": tiny("dense", qk_norm=False),
    "tied": tiny(tie_embeddings=True),
    "gqa": tiny(num_query_groups=2),
    "mqa_narrow_heads": tiny("dense", num_query_groups=1, kv_channels=2, num_layers=3),
    "depth_every_third": tiny(num_layers=5, depth=depth("per_modality", every=3)),
}


def parameters(model: GPTModel) -> int:
    """Parameters of a model, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_plan_counts_the_built_model(name: str, build: Callable[..., GPTModel]) -> None:
    config = SHAPES[name]
    model = build(config, randomised=False)
    counted = plan(config)["parameters"]
    assert counted["total"] == parameters(model)
    by_part = {
        "embedding": "embedding.",
        "output": "output_layer.",
        "attention": (".linear_qkv.", ".linear_proj."),
        "ffn": (".linear_fc1.", ".linear_fc2."),
        "experts": ".mlp.experts.",
        "shared_experts": ".mlp.shared.",
        "routers": ".mlp.router.",
        "depth_routers": ".depth_router",
        "norms": "norm",
    }
    for part, marks in by_part.items():
        marks = (marks,) if isinstance(marks, str) else marks
        own = [w.numel() for n, w in model.named_parameters() if any(mark in n for mark in marks)]
        assert counted[part] == sum(own), part


SMALL = (
    "model.hidden_size=16", "model.ffn_hidden_size=7", "model.num_attention_heads=2", "model.num_layers=4",
    "vocab.modalities=[{name: text, size: 40}, {name: image, size: 20}]", "precision.dtype=fp32",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("moma_*.yaml")), ids=lambda path: path.stem)
def test_plan_counts_shipped_configurations(path: Path, build: Callable[..., GPTModel]) -> None:
    """Every setting of the file except its sizes."""
    config = load(path, SMALL)
    assert plan(config)["parameters"]["total"] == parameters(build(config, randomised=False))


def test_there_are_shipped_configurations() -> None:
    """Control: the test above had some."""
    kinds = {load(path).model.kind for path in CONFIGS.glob("moma_*.yaml")}
    assert kinds == {"dense", "moe", "moma"}


def test_count_by_hand(build: Callable[..., GPTModel]) -> None:
    """Width 16, SwiGLU 24, 4 heads of 4, 32 padded ids, 2 layers, 4 experts: independent of the plan's formulas."""
    attention = 4 * 16 * 16 + 4 + 4  # q, k, v, o; q and k norm
    experts = 4 * (3 * 16 * 24) + 4 * 16  # and a router row for each
    assert parameters(build(tiny())) == 2 * 32 * 16 + 2 * (attention + experts + 16 + 16) + 16


@pytest.mark.parametrize("name", SHAPES)
def test_slots(name: str, build: Callable[..., GPTModel]) -> None:
    """The class of every layer, and norms where the placement wants them and nowhere else."""
    config = SHAPES[name]
    pre, sparse = config.model.norm == "pre", config.model.kind != "dense"
    per_expert = sparse and config.model.norm == "post_per_expert"
    for number, layer in enumerate(build(config, randomised=False).decoder.layers):
        assert type(layer) is (DepthLayer if config.model.is_depth_layer(number) else MixedModalLayer)
        assert layer.layer_number == number + 1
        assert isinstance(layer.mlp, MoMaMLP) is sparse
        if sparse:
            assert layer.mlp.layer_number == number + 1  # router noise differs from layer to layer by it
        for slot in (layer.input_layernorm, layer.pre_mlp_layernorm):
            assert isinstance(slot, RMSNorm) is pre
        for slot, normed in ((layer.self_attn_bda, not pre), (layer.mlp_bda, not pre and not per_expert)):
            assert isinstance(slot, Residual)
            assert (slot.norm is not None) is normed
        norms = [module for module in layer.modules() if isinstance(module, RMSNorm)]
        assert all(norm.eps == config.model.norm_eps for norm in norms)


def test_tied_embeddings_are_one_parameter(build: Callable[..., GPTModel]) -> None:
    model = build(tiny(tie_embeddings=True))
    assert model.shared_embedding_or_output_weight() is model.embedding.word_embeddings.weight
    assert "output_layer.weight" not in dict(model.named_parameters())


def test_groups_follow_the_vocabulary() -> None:
    """Ranks and checkpoints must agree, whatever the order in the file."""
    forward = moma_settings(tiny(experts=moma_experts(counts={"text": 3, "image": 1}, share=SHARE)))
    backward = moma_settings(
        tiny(experts=moma_experts(counts={"image": 1, "text": 3}, share=dict(reversed(SHARE.items()))))
    )
    assert forward == backward
    assert [(group.name, group.modalities) for group in forward.groups] == [("text", (0,)), ("image", (1,))]
    (mixed,) = moma_settings(tiny("moe")).groups
    assert (mixed.modalities, mixed.experts, mixed.share) == ((0, 1), 4, 1.0)


@pytest.mark.parametrize(
    "settings",
    [{"experts": moma_experts(share="auto")}, {"experts": moma_experts(share="auto"), "depth": depth("per_modality")}],
)
def test_share_must_be_known(settings: dict[str, object], build: Callable[..., GPTModel]) -> None:
    with pytest.raises(ConfigError, match=r"model\.experts\.share is 'auto'.*share=\{text"):
        build(tiny(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_share_need_not_be_known(kind: str, build: Callable[..., GPTModel]) -> None:
    """Mixed groups and mixed depth see all tokens."""
    counts = {"mixed": 2} if kind == "moe" else {}
    build(tiny(kind, experts=ExpertsConfig(counts=counts), depth=depth()))
    with pytest.raises(ConfigError):
        depth_settings(tiny(kind, experts=ExpertsConfig(counts=counts), depth=depth("per_modality")))


def test_megatron_is_told(process_groups: ProcessGroupCollection) -> None:
    del process_groups
    config = tiny(num_query_groups=2, norm_eps=1e-3, dropout=0.1, init_std=0.1)
    told = transformer_config(config)
    assert (told.num_layers, told.hidden_size, told.ffn_hidden_size) == (2, 16, 24)
    assert (told.num_attention_heads, told.num_query_groups, told.kv_channels) == (4, 2, 4)
    assert told.gated_linear_unit and not told.add_bias_linear
    assert told.layernorm_epsilon == 1e-3 and told.hidden_dropout == 0.1 and told.attention_dropout == 0.0
    assert told.qk_layernorm and told.calculate_per_token_loss
    assert told.params_dtype is torch.float32 and not told.bf16 and not told.sequence_parallel
    half = transformer_config(tiny(dtype="bf16", qk_norm=False))
    assert half.params_dtype is half.pipeline_dtype is torch.bfloat16 and half.bf16 and not half.qk_layernorm
    assert transformer_config(tiny(recompute="full")).recompute_granularity == "full"
    assert transformer_config(tiny(recompute="selective")).recompute_modules == ["core_attn"]


def test_building_is_quiet(process_groups: ProcessGroupCollection, caplog: pytest.LogCaptureFixture) -> None:
    """megatron-core would warn of an unknown MLP type in every layer; its level is restored afterwards."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    before = logger.level
    with caplog.at_level(logging.WARNING):
        build_chunks(tiny(), process_groups)
    assert "Unknown MLP" not in caplog.text
    assert logger.level == before


def test_every_matrix_is_marked_for_the_gradient_norm(build: Callable[..., GPTModel]) -> None:
    """megatron-core's gradient norm counts rank 0's shard only of parameters without the mark."""
    for config in (tiny(norm="post"), tiny("dense")):
        for name, weight in build(config).named_parameters():
            sharded = any(part in name for part in ("linear_", "embedding", "output_layer", ".w1", ".w2"))
            assert getattr(weight, "tensor_model_parallel", False) is sharded, name
