"""The table of tensors equals what the built model holds, for every combination of the parts of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from mmscale.checkpoint.shape import shape_of
from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.layers import TensorPart, model_tensors
from mmscale.layers.feed_forward import FEED_FORWARDS
from mmscale.model.build import build_chunks
from mmscale.model.spec import FEED_FORWARDS as MODULES
from mmscale.plan import count_parameters
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.settings import KINDS, NORMS


def config_of(kind: str, **model: Any) -> Config:
    """A tiny model of which all widths differ."""
    if KINDS[kind].experts:
        counts = {"text": 4, "image": 2} if KINDS[kind].per_modality else {"mixed": 4}
        model["experts"] = {"counts": counts, "share": {"text": 0.5, "image": 0.5}} | model.get("experts", {})
    modalities = [{"name": "text", "size": 40}, {"name": "image", "size": 24}]
    base: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 16,
    }
    return resolve({"vocab": {"modalities": modalities}, "model": {**base, "kind": kind, **model}})


def combinations() -> Iterator[Any]:
    """Every kind x norm placement x Mixture-of-Depths x routers for causal routing x shared experts."""
    for kind, norm, depth, routers, shared in itertools.product(KINDS, NORMS, (False, True), (False, True), (0, 2)):
        routes = KINDS[kind].experts or depth
        if (routers and not routes) or (shared and not KINDS[kind].experts):
            continue  # there is nothing to route, or no expert
        # More facts alternate with these, so that every value of them meets every kind and placement.
        plain = depth != routers
        model: dict[str, Any] = {"norm": norm, "qk_norm": plain, "tie_embeddings": not plain, "qkv_bias": depth}
        if depth:
            model["depth"] = {"every": 2, "capacity": 0.5}
        if routers:
            model["auxiliary"] = {"mode": "joint", "width": 6}
            model["experts"] = {"threshold_decay": 0.9}
        if shared:
            model["experts"] = {**model.get("experts", {}), "shared": shared, "shared_ffn_hidden_size": 10}
        name = f"{kind}-{norm}{'-depth' * depth}{'-routers' * routers}{'-shared' * bool(shared)}"
        yield pytest.param(kind, model, id=name)
    for kind, norm, depth in itertools.product([kind for kind in KINDS if KINDS[kind].experts], NORMS, (False, True)):
        model = {"norm": norm, "experts": {"token_choice": {}}}
        if depth:  # with routers and cut-offs of its own
            model |= {"depth": {"every": 2, "capacity": 0.5}, "auxiliary": {"mode": "joint", "width": 6}}
            model["experts"] |= {"threshold_decay": 0.9}
        yield pytest.param(kind, model, id=f"{kind}-{norm}-token choice{'-depth' * depth}")
    for norm, chosen in itertools.product(NORMS, (None, {})):
        experts = {"counts": {"text": 4, "image": 1}, "ungated": ["image"], "token_choice": chosen}
        model = {"norm": norm, "experts": experts, "auxiliary": {"mode": "joint" if chosen is None else "off"}}
        yield pytest.param("moma", model, id=f"moma-{norm}-ungated{'' if chosen is None else '-token choice'}")
    for kind, norm, untie in itertools.product(
        KINDS, NORMS, ("attention norms", "ffn", "final_norm", "attention ffn norms final_norm")
    ):
        if KINDS[kind].experts and "ffn" in untie:
            continue
        depth = {"every": 2, "capacity": 0.5} if norm == "post" else None
        model = {"norm": norm, "untie": untie.split(), "depth": depth}
        yield pytest.param(kind, model, id=f"{kind}-{norm}-untied {untie}")


def held(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers of a model that checkpoints hold, by name."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def test_every_kind_has_tensors_and_a_module() -> None:
    assert list(KINDS) == list(FEED_FORWARDS) == list(MODULES)


@pytest.fixture(scope="module")
def one_process() -> Iterator[ProcessGroupCollection]:
    groups.finalize()
    yield groups.initialize(RankEnv())
    groups.finalize()


@pytest.mark.parametrize(("kind", "model"), list(combinations()))
def test_the_model_holds_what_the_table_lists(
    kind: str, model: dict[str, Any], one_process: ProcessGroupCollection
) -> None:
    config = config_of(kind, **model)
    (built,) = build_chunks(config, one_process)
    listed = {tensor.name: tensor for tensor in model_tensors(config)}
    found = held(built)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in listed.items()
    }
    assert {name for name, tensor in found.items() if isinstance(tensor, nn.Parameter)} == {
        name for name, tensor in listed.items() if tensor.is_parameter
    }
    for name, tensor in found.items():
        sharded = tensor.partition_dim if getattr(tensor, "tensor_model_parallel", False) else None
        assert sharded == listed[name].tp_axis, name
        # megatron-core keeps these in buffers of their own, reduced over fewer ranks.
        assert getattr(tensor, "allreduce", True) != listed[name].spread, name
    parameters = sum(tensor.size for tensor in listed.values() if tensor.is_parameter)
    assert parameters == count_parameters(config).total == sum(p.numel() for p in built.parameters())
    exported = [name for tensor in listed.values() for name in tensor.hf]
    assert len(set(exported)) == len(exported)


CHANGES: dict[str, dict[str, Any]] = {
    "more layers": {"num_layers": 3},
    "width": {"hidden_size": 64},
    "inner width": {"ffn_hidden_size": 64},
    "heads": {"num_attention_heads": 8},
    "key/value heads": {"num_query_groups": 4},
    "width of a head": {"kv_channels": 32},
    "norm": {"norm": "post"},
    "normalised experts": {"norm": "post_per_expert"},
    "QK-norm": {"qk_norm": False},
    "biases": {"qkv_bias": True},
    "untied weights": {"untie": ["attention"]},
    "output layer": {"tie_embeddings": True},
    "experts": {"experts": {"counts": {"text": 4, "image": 4}}},
    "no router": {"experts": {"counts": {"text": 4, "image": 1}, "ungated": ["image"]}},
    "shared experts": {"experts": {"shared": 1}},
    "depth": {"depth": {"every": 2, "capacity": 0.5}},
    "auxiliary routers": {"auxiliary": {"mode": "joint"}},
    "cut-offs": {"experts": {"threshold_decay": 0.9}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_other_tensors_has_another_shape(change: str) -> None:
    """What check_shape compares distinguishes all models whose tables differ."""
    before, after = config_of("moma"), config_of("moma", **CHANGES[change])
    assert model_tensors(before) != model_tensors(after)
    assert shape_of(before) != shape_of(after)


def test_modalities_of_tensors() -> None:
    """Experts of a modality are its own; a mixed group is nobody's."""
    for kind, wanted in {"moma": {"text", "image"}, "moe": {None}}.items():
        experts = [tensor for tensor in model_tensors(config_of(kind)) if tensor.part is TensorPart.EXPERTS]
        assert {tensor.modality for tensor in experts} == wanted
        assert all(tensor.group for tensor in experts)
