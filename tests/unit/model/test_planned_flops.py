"""The plan's FLOPs against torch's FlopCounterMode, exactly: what the plan counts is what the model runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch.utils.flop_counter import FlopCounterMode

from mmscale.config import Config, ExpertsConfig, OptimConfig
from mmscale.model.freezing import freeze
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.plan import count_parameters, flops_per_token
from mmscale.tables.settings import UNTIED
from tests.unit.model.comparison import params_of
from tests.unit.model.reference import Batch, depth, moma_experts, tiny

_SEQUENCES = 3
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Both products over all pairs of a square, as torch's own formulas for attention count a causal mask."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _vector(matrix: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


# Torch knows no formulas for these two.
_FORMULAS = {_ATTENTION: _attention, torch.ops.aten.mv: _vector}

_HALVES = {"text": 0.5, "image": 0.5}
_MODELS = {
    "dense": tiny("dense"),
    "dense_gqa": tiny("dense", num_query_groups=2),
    "dense_depth": tiny("dense", depth=depth()),
    "moe": tiny("moe"),
    "moe_micro_batch": tiny(
        "moe", experts=ExpertsConfig.model_validate({"counts": {"mixed": 4}, "scope": "micro_batch"})
    ),
    "moma": tiny(),
    "moma_capacity": tiny(experts=moma_experts(capacity_factor=1.7, capacity_multiple=4)),
    "moma_shared": tiny(experts=moma_experts(shared=2, shared_ffn_hidden_size=10), norm="post_per_expert"),
    "moma_actual": tiny(experts=moma_experts(capacity="actual", scope="micro_batch", capacity_factor=1.4)),
    "moma_actual_depth": tiny(depth=depth(), experts=moma_experts(capacity="actual")),
    "moma_actual_depth_per_modality": tiny(depth=depth("per_modality"), experts=moma_experts(capacity="actual")),
    # Without a limit the slots depend on the tokens' choices; here every token chooses both experts of its group.
    "token_choice_of_all": tiny(experts=moma_experts(counts={"text": 2, "image": 2}, token_choice={"top_k": 2})),
    "token_choice_limited": tiny(
        depth=depth(), experts=moma_experts(token_choice={"capacity_factor": 1.25}, capacity_multiple=2)
    ),
    "mot": tiny("dense", untie=["attention", "ffn"], experts=ExpertsConfig.model_validate({"share": _HALVES})),
    "mot_norms": tiny("dense", untie=list(UNTIED), experts=ExpertsConfig.model_validate({"share": _HALVES})),
    "mot_4t1i": tiny(
        untie=["attention"],
        experts=moma_experts(counts={"text": 2, "image": 1}, ungated=["image"], capacity_multiple=4, shared=1),
    ),
    "mot_4t1i_depth": tiny(depth=depth(), experts=moma_experts(counts={"text": 2, "image": 1}, ungated=["image"])),
    "mot_4t1i_depth_per_modality": tiny(
        depth=depth("per_modality"), experts=moma_experts(counts={"text": 2, "image": 1}, ungated=["image"])
    ),
    "moma_untied": tiny(untie=["attention", "norms"]),
    "frozen": tiny().model_copy(update={"optim": OptimConfig(freeze=("text",))}),
    "moma_depth": tiny(depth=depth()),
    "moma_depth_per_modality": tiny(depth=depth("per_modality"), num_layers=4),
}


def _micro_batch(config: Config) -> tuple[torch.Tensor, MixedModalParams]:
    """Ids of nominal shares, and one document for each sequence, so that attention is one causal square."""
    shape = (config.train.micro_batch_size, config.model.seq_length)
    generator = torch.Generator().manual_seed(3)
    (low, first), (_, end) = config.vocab.ranges
    text = torch.randint(low + 1, first, shape, generator=generator)  # id 0 is padding
    image = torch.randint(first, end, shape, generator=generator)
    ids = torch.where(torch.arange(shape[1]) % 2 == 0, text, image)
    positions = torch.arange(shape[1]).expand(shape)
    documents = torch.arange(shape[0], dtype=torch.int32).unsqueeze(1).expand(shape)
    facts = Batch(ids, (ids >= first).to(torch.int8), positions, documents)
    return ids, params_of(facts)


def _picked_weights(config: Config, tokens: int) -> int:
    """Products with zeros and ones by which untied norms pick each token's weights. The plan does not count them."""
    model = config.model
    widths = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    of_layers = widths * model.num_layers if "norms" in model.untie else 0
    final = model.hidden_size if "final_norm" in model.untie else 0
    return 2 * len(config.vocab.names) * (of_layers + final) * tokens


@pytest.mark.parametrize("name", _MODELS)
def test_exactly_what_the_model_runs(name: str, build: Callable[..., GPTModel]) -> None:
    config = _MODELS[name].model_copy(
        update={"train": _MODELS[name].train.model_copy(update={"micro_batch_size": _SEQUENCES})}
    )
    ids, params = _micro_batch(config)
    model, tokens = build(config), ids.numel()
    freeze(config, [model])
    planned = flops_per_token(config)
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as forward:
        logits = model(input_ids=ids, position_ids=None, attention_mask=None, packed_seq_params=params)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
    found = forward.get_flop_counts()["Global"]
    # The plan counts what a causal mask leaves over, torch the whole square.
    assert found[_ATTENTION] == round(2 * planned.attention * tokens)
    picked = _picked_weights(config, tokens)
    assert sum(found.values()) == round((planned.forward + planned.attention) * tokens) + picked

    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    depth_routers = (
        2.0 * config.model.hidden_size * sum(map(config.model.is_depth_layer, range(config.model.num_layers)))
    )
    products = planned.forward - planned.attention - depth_routers  # a vector's backward is no matrix product
    assert backward.get_total_flops() == round((2 * products - planned.frozen) * tokens) + picked
