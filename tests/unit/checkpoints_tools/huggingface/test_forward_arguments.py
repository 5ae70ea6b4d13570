"""Arguments of the shipped model's forward: both names of the cache, and none that is silently ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported

IDS = torch.tensor([[1, 6, 25, 7, 30, 9, 26, 8]])


@pytest.fixture(scope="module")
def model() -> MomaForCausalLM:
    return exported(MODELS["depth"])


def whole(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(name: str, model: MomaForCausalLM) -> None:
    """transformers passes `cache` from 5.24 on, `past_key_values` before."""
    cache = DynamicCache(config=model.config)
    parts = [whole(model, IDS[:, a:b], **{name: cache}) for a, b in ((0, 5), (5, 6), (6, 8))]
    assert cache.get_seq_length() == 8
    want = whole(model, use_cache=False)
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=2e-5 * float(want.abs().max()))


def test_both_outputs_have_the_cache(model: MomaForCausalLM) -> None:
    for one in (model, model.model):
        assert one(IDS).past_key_values.get_seq_length() == 8
        assert one(IDS, use_cache=False).past_key_values is None


def test_two_caches_are_refused(model: MomaForCausalLM) -> None:
    for one in (model, model.model):
        with pytest.raises(TypeError, match="either cache or past_key_values"):
            one(IDS, cache=DynamicCache(), past_key_values=DynamicCache())


UNKNOWN: dict[str, Any] = {
    "caches": None,  # a misspelt name, whatever it holds
    "cache_params": DynamicCache(),
    "token_type_ids": torch.zeros_like(IDS),
    "pixel_values": torch.zeros(1, 3, 8, 8),
    "cu_seq_lens_q": torch.tensor([0, 3, 8]),
    "seq_idx": torch.zeros_like(IDS),
    "is_causal": False,
    "output_router_logits": True,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_ignored(name: str, model: MomaForCausalLM) -> None:
    for one in (model, model.model):
        with pytest.raises(TypeError, match=rf"{type(one).__name__}.forward\(\) .*{name}"):
            one(IDS, **{name: UNKNOWN[name]})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        model.model(IDS, labels=IDS)


def test_what_transformers_passes_is_taken(model: MomaForCausalLM) -> None:
    """By its trainer, its generation, peft, recording and its debugger, where they ask for nothing special."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("inputs_embeds", "labels", "output_attentions", "output_hidden_states", "return_dict", "cu_seq_lens_q")
    )
    want = whole(model)
    assert torch.equal(whole(model, **nothing, is_causal=True, output_router_logits=False), want)
    assert torch.equal(model(IDS, return_dict=False)[0], want)
    recorded = model(IDS, output_hidden_states=True)
    assert len(recorded.hidden_states) == 4 and recorded.hidden_states[0].shape == (1, 8, 16)
    mean = model(IDS, labels=IDS).loss
    assert torch.allclose(model(IDS, labels=IDS, num_items_in_batch=torch.tensor(14)).loss, mean / 2)
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(IDS, labels=IDS, shift_labels=shifted).loss, mean)
    # A product of fewer rows is rounded differently on some processors.
    kept = model(IDS, logits_to_keep=torch.tensor([2, 7])).logits
    torch.testing.assert_close(kept, want[:, [2, 7]], rtol=1e-5, atol=1e-5)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_separated_or_refused(attention: str) -> None:
    model = exported(MODELS["depth"], attn_implementation=attention)
    packed = whole(model, position_ids=POSITIONS, use_cache=False)
    apart = torch.cat([whole(model, IDS[:, :3]), whole(model, IDS[:, 3:])], dim=1)
    assert torch.allclose(packed, apart, atol=2e-5 * float(apart.abs().max()))
    mixing: list[dict[str, Any]] = [
        {},  # a cache is the default
        {"use_cache": False, "attention_mask": torch.ones_like(IDS)},
        {"cache": DynamicCache(config=model.config)},
    ]
    for arguments in mixing:
        with pytest.raises(ValueError, match="packed documents would be mixed; give one document per row"):
            whole(model, position_ids=POSITIONS, **arguments)


def test_padded_positions_are_no_packed_documents(model: MomaForCausalLM) -> None:
    left = torch.tensor([[0, 0, *IDS[0, :6].tolist()]])
    mask = (left != 0).long()
    want = whole(model, IDS[:, :6])
    whole(model, torch.zeros(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, 0]]))  # padding, though seen
    for positions in ([[0, 0, 0, 1, 2, 3, 4, 5]], [[1, 1, 0, 1, 2, 3, 4, 5]]):
        got = whole(model, left, attention_mask=mask, position_ids=torch.tensor(positions))[:, 2:]
        assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))
