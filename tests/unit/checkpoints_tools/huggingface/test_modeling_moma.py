"""The shipped modelling file against slow loops in fp64; caches, padding, beams and precision against itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.shipped.configuration_moma import MomaConfig
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
from checkpoints_tools.huggingface.weights import moves
from mmscale.config import Config, ExpertsConfig, ModalityVocab
from tests.unit.checkpoints_tools.huggingface.causal_reference import CausalReference
from tests.unit.model.reference import SHARE, batch_of, depth, moma_experts, random_documents, tiny

TOLERANCE = 2e-5  # of the largest logit
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}
MODELS: dict[str, Config] = {
    "moma": tiny("moma", num_query_groups=2),
    "tied without QK-norm": tiny("moma", tie_embeddings=True, qk_norm=False),
    "biases, scaled RoPE": tiny(
        "moma", qkv_bias=True, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "YaRN": tiny("moma", kv_channels=8, rope_base=100.0, rope_scaling=YARN),
    "YaRN, own attention factor": tiny(
        "moma", kv_channels=8, rope_base=100.0, rope_scaling=YARN | {"attention_factor": 1.5, "truncate": False}
    ),
    "linear RoPE": tiny("moma", rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "post norm, shared": tiny("moma", norm="post", experts=moma_experts(shared=2, shared_ffn_hidden_size=6)),
    "normalised experts, shared": tiny("moma", norm="post_per_expert", experts=moma_experts(shared=1)),
    "moe": tiny("moe"),
    "depth": tiny("moma", num_layers=3, depth=depth()),
    "depth, post norm": tiny("moma", norm="post", depth=depth()),
    "dense, post norm": tiny("dense", norm="post"),
    "dense depth": tiny("dense", num_layers=3, depth=depth(), num_query_groups=1),
    "untied": tiny("dense", untie=["attention", "ffn", "norms", "final_norm"], num_query_groups=2),
    "untied depth, post norm": tiny(
        "dense", untie=["attention", "ffn", "norms"], num_layers=3, depth=depth(), norm="post"
    ),
    "ungated": tiny(
        "moma",
        untie=["attention", "norms"],
        experts=moma_experts(counts={"text": 3, "image": 1}, ungated=["image"], shared=1),
    ),
    "ungated, normalised": tiny("moma", norm="post_per_expert", experts=moma_experts(ungated=["image"])),
    "untied moma": tiny("moma", untie=["attention", "norms", "final_norm"], norm="post_per_expert"),
    "untied final norm, post": tiny("moma", untie=["final_norm"], norm="post", experts=moma_experts(shared=1)),
    "untied final norm, moe": tiny("moe", untie=["final_norm"]),
    "competitive": tiny("moma", num_layers=3, depth=depth(), experts=moma_experts(choice="competitive")),
    "softmax": tiny("moe", experts=ExpertsConfig(counts={"any": 4}, choice="softmax", share=SHARE)),
    "three modalities": tiny(
        "moma",
        experts=ExpertsConfig(
            counts={"text": 2, "image": 1, "speech": 2}, share={"text": 0.5, "image": 0.25, "speech": 0.25}
        ),
        more=(ModalityVocab(name="speech", size=9),),
        depth=depth(),
    ),
}


def exported(config: Config, *, routing: str = "causal", seed: int = 0, **settings: Any) -> MomaForCausalLM:
    """A model with weights that use every path: gates away from 1/2, thresholds away from scores."""
    routes = config.model.kind != "dense" or config.model.depth is not None
    content = model_config(
        config, auxiliary_size=5 if routes else 0, thresholds=routes, routing=routing, tokens_per_image=4
    )
    model = MomaForCausalLM(MomaConfig(**content | {"dtype": "float32"} | settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tied = "lm_head.weight" if config.model.tie_embeddings else ""
        for name, parameter in model.state_dict(keep_vars=True).items():
            if name == tied:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "threshold" in name:
                cut = -math.log(4) if config.model.experts.choice == "softmax" else 0.0
                parameter.copy_(0.45 + 0.05 * noise if "auxiliary" in name else cut + 0.2 * noise)
            else:
                parameter.copy_(0.4 * noise)
    return model


def weights_of(model: MomaForCausalLM, config: Config) -> dict[str, Tensor]:
    """The model's weights by the checkpoint's names, fp64."""
    state = model.state_dict()
    cfg = model.config
    listed = moves(config, auxiliary=cfg.auxiliary_size > 0, thresholds=cfg.keeps_thresholds)
    used = {name for move in listed for name in move.targets}
    assert used == set(state) - ({"lm_head.weight"} if config.model.tie_embeddings else set())
    return {move.source: move.join([state[name] for name in move.targets]).double() for move in listed}


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents((12, 12), seed=5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_reference(name: str, documents: list[list[int]]) -> None:
    config = MODELS[name]
    model = exported(config)
    ids = [[*documents[0][:-3], 35, 33, 39] if len(config.vocab.names) == 3 else documents[0], documents[1]]
    reference = CausalReference(config, weights_of(model, config))
    want = reference.logits(batch_of([[row] for row in ids], length=12))
    assert reference.margin > 1e-5, "a decision is too close to call: choose another seed"
    with torch.no_grad():
        got = model(torch.tensor(ids)).logits
    assert float((got - want).abs().max() / want.abs().max()) < TOLERANCE


@pytest.mark.parametrize("routing", ["top1", "threshold"])
@pytest.mark.parametrize("name", ["depth", "moe", "competitive", "softmax"])
def test_other_routings(name: str, routing: str, documents: list[list[int]]) -> None:
    config = MODELS[name]
    model = exported(config, routing=routing)
    want = CausalReference(config, weights_of(model, config), routing=routing).logits(
        batch_of([[row] for row in documents], length=12)
    )
    with torch.no_grad():
        got = model(torch.tensor(documents)).logits
    assert float((got - want).abs().max() / want.abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", ["moma", "depth", "dense depth", "normalised experts, shared"])
def test_moves_come_back_bit_by_bit(name: str) -> None:
    config = MODELS[name]
    state = exported(config).state_dict()
    for move in moves(config, auxiliary=True, thresholds=True):
        whole = move.join([state[target] for target in move.targets])
        for target, part in zip(move.targets, move.split(whole), strict=True):
            assert torch.equal(part, state[target]) and part.shape == state[target].shape, target


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_a_cache_as_without(attention: str, documents: list[list[int]]) -> None:
    model = exported(MODELS["depth"], attn_implementation=attention)
    ids = torch.tensor(documents)
    with torch.no_grad():
        want = model(ids).logits
        first = model(ids[:, :5], use_cache=True)  # chunked prefill, then one by one
        parts, cache = [first.logits], first.past_key_values
        for at in range(5, ids.shape[1]):
            step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=2e-5 * float(want.abs().max()))


def generated(model: MomaForCausalLM, ids: Tensor, **settings: Any) -> list[list[int]]:
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    out = model.generate(ids, attention_mask=mask, **settings)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 31}],
    ids=["greedy", "static cache", "beams", "prompt lookup"],
)
def test_generation_does_not_depend_on_the_cache(settings: dict[str, Any], documents: list[list[int]]) -> None:
    model = exported(MODELS["depth"])
    ids = torch.tensor(documents[:1])
    want = {key: value for key, value in settings.items() if key in ("num_beams", "eos_token_id")}
    assert generated(model, ids, **settings) == generated(model, ids, use_cache=False, **want)


def test_left_padding_changes_nothing(documents: list[list[int]]) -> None:
    model = exported(MODELS["depth"])
    rows = [documents[0][:9], documents[1][:4]]
    padded = torch.tensor([rows[0], [0] * 5 + rows[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    alone = [generated(model, torch.tensor([row]))[0] for row in rows]
    assert generated(model, padded, attention_mask=mask) == alone


def test_a_skipped_token_is_no_key(documents: list[list[int]]) -> None:
    """What a layer does not process cannot be attended to in it."""
    model = exported(MODELS["depth"])
    layer, ids = model.model.layers[0], torch.tensor(documents[:1])
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids)
        keep = layer.depth_auxiliary(hidden)[1].squeeze(-1)[0].tolist()
        skipped = keep.index(False)
        assert any(keep[skipped:]), "no token behind it: choose another seed"
        facts = {
            "modality": model.model.modality_of(ids),
            "attention_mask": None,
            "position_embeddings": model.model.rotary_emb(hidden, torch.arange(12)[None]),
        }
        before = layer(hidden, **facts)
        other = hidden.clone()
        other[0, skipped] *= 1.001  # too little to change the decision
        after = layer(other, **facts)
    assert layer.depth_auxiliary(other)[1].squeeze(-1)[0].tolist() == keep
    same = [at for at in range(12) if at != skipped]
    assert torch.equal(before[0, same], after[0, same]) and torch.equal(after[0, skipped], other[0, skipped])


def test_bf16_keeps_thresholds_exact(tmp_path: Any) -> None:
    model = exported(MODELS["depth"])
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {name for name in dtypes if "threshold" in name}
    assert torch.isfinite(loaded(torch.tensor([[1, 6, 25, 7]])).logits).all()


def test_loss_and_gradient(documents: list[list[int]]) -> None:
    model = exported(MODELS["depth"])
    ids = torch.tensor(documents)
    loss = model(ids, labels=ids).loss
    logits = model(ids).logits[:, :-1].reshape(-1, model.config.vocab_size)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)))
    loss.backward()
    assert model.model.layers[0].mlp.experts["text"].gate_up_proj.grad.abs().sum() > 0


def test_what_it_refuses() -> None:
    content = model_config(MODELS["moma"], auxiliary_size=0, thresholds=False, routing="causal", tokens_per_image=4)
    with pytest.raises(ValueError, match="needs tensors"):
        MomaConfig(**content)
    with pytest.raises(ValueError, match="norm must be one of"):
        MomaConfig(norm="swin")
    with pytest.raises(ValueError, match="routing must be one of"):
        MomaConfig(routing="batch")
    model = exported(MODELS["moma"])
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
