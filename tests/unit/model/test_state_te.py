"""Transformer-Engine's weights and FP8 state as checkpoints hold them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.model.build import gradient_fusion
from mmscale.model.expert_compute import BATCHED, chosen, feed_forward
from mmscale.model.spec import TORCH, parts
from mmscale.model.state_te import Scaling, expert_weight, w1_of, w2_of, weight_of_w1, weight_of_w2
from mmscale.runtime import device, doctor
from mmscale.train.optim.boxes import boxes_of
from tests.distributed.layouts import config

EXPERTS, HIDDEN, INNER = 3, 5, 7


def test_grouped_weights_compute_what_the_stacked_ones_do() -> None:
    first = [torch.randn(2 * INNER, HIDDEN) for _ in range(EXPERTS)]
    second = [torch.randn(HIDDEN, INNER) for _ in range(EXPERTS)]
    tokens = torch.randn(EXPERTS, 4, HIDDEN)
    stacked = feed_forward(
        tokens, torch.cat([w1_of(w) for w in first]), torch.cat([w2_of(w) for w in second]), compute=BATCHED
    )
    for expert in range(EXPERTS):
        gate, up = F.linear(tokens[expert], first[expert]).chunk(2, dim=-1)
        torch.testing.assert_close(stacked[expert], F.linear(F.silu(gate) * up, second[expert]))
        assert torch.equal(weight_of_w1(w1_of(first[expert])), first[expert])
        assert torch.equal(weight_of_w2(w2_of(second[expert])), second[expert])
        assert w1_of(first[expert]).data_ptr() == first[expert].data_ptr()  # views: initial weights are drawn into them


@pytest.mark.parametrize("name", ["w1", "w2"])
@pytest.mark.parametrize(("start", "end"), [(0, 70), (3, 4), (11, 47), (34, 36), (0, 35)])
def test_any_part_of_the_optimizers_state_stands_in_its_place_of_the_stacked_tensor(
    name: str, start: int, end: int
) -> None:
    shape = (2 * INNER, HIDDEN) if name == "w1" else (HIDDEN, INNER)
    parameter = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    end = min(end, parameter.numel())
    place = expert_weight(parameter, name=name, key="k", expert=(1, EXPERTS), tensor_parallel=(0, 1), replica=0)
    (whole,) = place.build()
    stacked = torch.full(whole.global_shape, -1.0)
    owned = parameter.view(-1)[start:end].clone()
    for piece in boxes_of(place, parameter, start, end):
        shard = piece.shard("state", owned)
        part = stacked[tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))]
        assert (part == -1).all()
        part.copy_(shard.data)
    expected = torch.full(shape, -1.0).view(-1)
    expected[start:end] = owned
    view = w1_of if name == "w1" else w2_of
    assert torch.equal(stacked[1:2], view(expected.view(shape)))
    assert (stacked[[0, 2]] == -1).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_scales_are_packed_by_product_and_kind(interleaved: bool) -> None:
    """Transformer-Engine 2.11 keeps a product's three tensors together, older ones all inputs before all weights."""
    products, history = 4, 6
    names = [(g, k) if interleaved else (k, g) for g in range(products) for k in range(3)]
    order = sorted(range(12), key=lambda i: names[i])
    by_product = torch.tensor([10.0 * g + k for g in range(products) for k in range(3)])
    scale = by_product[order]
    state = Scaling(
        scale, scale.repeat(history, 1) + 100, torch.arange(8.0), torch.arange(8.0 * history).view(history, 8)
    )
    packed = state.packed(interleaved=interleaved)
    assert packed.shape == (1 + history, products, 5)
    for g in range(products):
        for k in range(3):
            assert packed[0, g, k] == 10 * g + k and packed[3, g, k] == 100 + 10 * g + k
    for mine, other in zip(state, Scaling.unpacked(packed, interleaved=interleaved), strict=True):
        assert torch.equal(mine, other)
    fresh = Scaling.fresh(products, history).packed(interleaved=interleaved)
    assert (fresh[0] == 1).all() and (fresh[1:] == 0).all()


def _with(**model: object) -> Config:
    made = config("moma")
    return made.model_copy(update={"model": made.model.model_copy(update=model)})


needs_none = pytest.mark.skipif(device.has_cuda(), reason="shows what a machine without CUDA says")


@needs_none
def test_auto_is_torch_without_cuda_and_te_is_refused() -> None:
    assert parts(_with(backend="auto"), None) is TORCH  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model.backend = te needs Transformer-Engine, but there is no CUDA device"):
        parts(_with(backend="te"), None)  # type: ignore[arg-type]
    experts = config("moma").model.experts.model_copy(update={"compute": "te"})
    with pytest.raises(ConfigError, match=r"model.experts.compute = te needs Transformer-Engine"):
        chosen(_with(experts=experts))


@needs_none
@pytest.mark.parametrize(
    ("cuda", "status", "says"),
    [
        (False, "ok", "there is no CUDA device"),
        (True, "absent", "apex is not installed"),
        (True, "wrong", "apex is not NVIDIA's"),
        (True, "python-only", "apex is built without its CUDA extensions"),
    ],
)
def test_fused_gradients_need_the_real_apex(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, status: str, says: str
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: cuda)
    monkeypatch.setattr(doctor, "apex_status", lambda: status)
    with pytest.raises(ConfigError, match=says):
        gradient_fusion(_with(backend="torch", gradient_accumulation_fusion="on"))
    # The output layer is a linear of megatron-core, which raises RuntimeError where this is true without the kernel.
    assert not gradient_fusion(_with(backend="torch")).everywhere


@needs_none
def test_the_real_apex_fuses_everywhere_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(doctor, "apex_status", lambda: "ok")
    assert gradient_fusion(_with(backend="torch")).everywhere
    assert not gradient_fusion(_with(backend="torch", gradient_accumulation_fusion="off")).everywhere
