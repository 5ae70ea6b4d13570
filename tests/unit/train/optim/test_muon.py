"""Muon against a slow reference in fp64, one matrix at a time; and how matrices lie in parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.config import Config, MuonConfig
from mmscale.layers import layer_tensors
from mmscale.layers.matrices import MatrixStack, is_hidden_matrix, matrices_of, newton_schulz_flops
from mmscale.train.optim.adam import require_slow_start
from mmscale.train.optim.matrix_exchange import Unit, _rounds, with_owners
from mmscale.train.optim.matrix_layout import MatrixLayout, matrix_layouts
from mmscale.train.optim.newton_schulz import orthogonalized
from tests.distributed.layouts import config

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def reference(matrix: Tensor, steps: int = 5) -> Tensor:
    """One matrix in fp64, by its singular values: each becomes p(p(...p(s))) with p(s) = a s + b s^3 + c s^5."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm().clamp(min=1e-7)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(5, 7, 12), (3, 12, 7), (2, 8, 8), (4, 1, 9), (1, 9, 1), (1, 1, 1)])
def test_a_stack_equals_the_reference_of_each_matrix(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(shape) * torch.logspace(-5, 3, shape[0])[:, None, None]
    found = orthogonalized(stack, steps=5, coefficients=COEFFICIENTS)
    wanted = torch.stack([reference(matrix) for matrix in stack])
    torch.testing.assert_close(found.double(), wanted, atol=3e-5, rtol=0)
    alone = torch.cat([orthogonalized(matrix[None], steps=5, coefficients=COEFFICIENTS) for matrix in stack])
    torch.testing.assert_close(found, alone, atol=3e-6, rtol=0)


def test_singular_values_are_near_one_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = torch.randn(6, 32, 48)
    found = orthogonalized(stack, steps=5, coefficients=COEFFICIENTS)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    monkeypatch.setattr("mmscale.train.optim.newton_schulz._CHUNK_HOST", 2 * 32 * 48)
    torch.testing.assert_close(orthogonalized(stack, steps=5, coefficients=COEFFICIENTS), found, atol=1e-6, rtol=0)


def test_zeros_stay_zeros_and_tiny_matrices_stay_small() -> None:
    """A gradient that is zero except for rounding errors must not become a full update."""
    stack = torch.stack([torch.zeros(8, 8), torch.randn(8, 8) * 1e-15])
    found = orthogonalized(stack, steps=5, coefficients=COEFFICIENTS)
    assert float(found[0].abs().max()) == 0.0
    assert float(found[1].abs().max()) < 1e-3


def test_bf16_products_are_near_fp32() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 24)
    exact = orthogonalized(stack, steps=5, coefficients=COEFFICIENTS)
    rounded = orthogonalized(stack, steps=5, coefficients=COEFFICIENTS, dtype=torch.bfloat16)
    assert rounded.dtype is torch.float32
    difference = float((rounded - exact).norm() / exact.norm())
    assert 0 < difference < 0.1


MODELS = ("dense", "moma", "moma_7t1i", "moma_one_kv_head", "mot", "moma_untied")


def tables(model: str) -> dict[str, Any]:
    """The weights of a layer that Muon updates, by name."""
    return {one.name: one for one in layer_tensors(config(model), depth=True) if is_hidden_matrix(one)}


def test_only_matrices_of_hidden_layers_are_muons() -> None:
    """Not routers, although they are matrices; not biases and norms."""
    found = tables("moma_7t1i") | tables("moma_one_kv_head")
    assert set(found) == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        *(f"mlp.experts.{group}.{name}" for group in ("text", "image") for name in ("w1", "w2")),
        "mlp.shared.w1",
        "mlp.shared.w2",
    }


def local_parts(whole: Tensor, name: str, ranks: int) -> list[Tensor]:
    """A slow description of how tensor-parallel ranks share a weight (Megatron's column and row linears)."""
    if "linear_fc1" in name:  # every rank has a part of the gate rows, then one of the up rows
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    axis = {"linear_qkv": 0, "linear_proj": 1, "linear_fc2": 1, ".w1": 3, ".w2": 1}
    return list(whole.chunk(ranks, dim=next(axis for key, axis in axis.items() if key in name)))


def true_matrices(whole: Tensor, name: str, made: Config) -> list[Tensor]:
    """Every single matrix of an unsharded weight, in the order of its stacks."""
    if "linear_qkv" in name:
        head, groups = made.model.head_dim, made.model.query_groups
        per = made.model.num_attention_heads // groups
        heads = list(whole.split(head))  # of each group: its queries, its key, its value
        kinds: list[list[Tensor]] = [[], [], []]
        for number, rows in enumerate(heads):
            place = number % (per + 2)
            kinds[0 if place < per else place - per + 1].append(rows)
        return [torch.cat(kind) for kind in kinds]
    if "linear_fc1" in name:
        return list(whole.chunk(2))
    if whole.ndim == 4:
        return [whole[expert, :, half] for expert in range(len(whole)) for half in range(2)]
    return list(whole) if whole.ndim == 3 else [whole]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_parts_of_ranks_join_to_the_true_matrices(model: str, ranks: int) -> None:
    made = config(model)
    for name, tensor in tables(model).items():
        whole = torch.randn(tensor.shape)
        parts = local_parts(whole, name, ranks)
        (layout,) = matrix_layouts(
            made, [(f"module.decoder.layers.3.{name}", parts[0])], tensor_parallel=ranks
        ).values()
        # One unit after the other, as matrix_exchange.py cuts them.
        flat = [part.reshape(layout.units, -1) for part in parts]
        found: list[Tensor] = []
        for unit in range(layout.units):
            mine = [part[unit] for part in flat]
            stacks = layout.matrices(mine)
            assert [MatrixStack(*stack.shape) for stack in stacks] == list(layout.stacks)
            found += [matrix for stack in stacks for matrix in stack]
            again = layout.parts(stacks, ranks=ranks)
            assert all(torch.equal(one, other) for one, other in zip(mine, again, strict=True)), name
        wanted = true_matrices(whole, name, made)
        assert len(found) == len(wanted) == sum(stack.count for stack in matrices_of(made, tensor)), name
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), name


def test_experts_of_transformer_engine_have_the_matrices_of_the_stack() -> None:
    made = config("moma")
    w1, w2 = torch.randn(64, 2, 32), torch.randn(32, 64)  # of one expert on one of two ranks
    names = [("decoder.layers.0.mlp.experts.text.linear_fc1.weight3", w1.permute(1, 2, 0).reshape(64, 64))]
    names += [("decoder.layers.0.mlp.experts.text.linear_fc2.weight3", w2.t().contiguous())]
    names += [("decoder.layers.0.mlp.router.text", torch.randn(4, 64)), ("embedding.weight", torch.randn(9, 64))]
    found = matrix_layouts(made, names, tensor_parallel=2)
    assert len(found) == 2
    first, second = found.values()
    assert first.stacks == (MatrixStack(2, 64, 64),) and second.stacks == (MatrixStack(1, 64, 64),)
    gate_up = first.matrices([names[0][1].reshape(-1)] * 2)[0]
    assert torch.equal(gate_up[0, :32], w1[:, 0].t()) and torch.equal(gate_up[1, 32:], w1[:, 1].t())
    assert torch.equal(second.matrices([names[1][1].reshape(-1)] * 2)[0][0, :, 32:], w2.t())


def unit(rows: int, *, shared: bool = True, count: int = 1) -> Unit:
    layout = MatrixLayout(1, (rows, rows), 0 if shared else None, (MatrixStack(count, rows, rows),))
    return Unit(torch.empty(0), layout, 0, rows * rows, (0, 0), ())


def no_work() -> dict[tuple[int, int], float]:
    """Of two data-parallel times two tensor-parallel ranks."""
    return {(row, column): 0.0 for row in range(2) for column in range(2)}


def test_owners_have_equal_work() -> None:
    """The largest difference is at most the cheapest unit that the busiest rank could do without."""
    units = [unit(size) for size in (8, 64, 16, 32, 64, 48, 32, 24, 64, 16, 8, 40)]
    dealt = with_owners(units, no_work())
    assert [one.end for one in dealt] == [one.end for one in units]  # the order is that of all ranks
    work: dict[tuple[int, int], list[float]] = {}
    for one in dealt:
        work.setdefault(one.owner, []).append(one.cost)
    assert len(work) == 4
    loads = sorted(sum(costs) for costs in work.values())
    busiest = max(work.values(), key=sum)
    assert loads[-1] - loads[0] <= min(busiest)


def test_every_tensor_parallel_rank_works_on_units_that_are_not_shared() -> None:
    dealt = with_owners([unit(64, shared=False), unit(32), unit(32)], no_work())
    assert dealt[0].owner[0] == 0
    assert [one.owner for one in dealt[1:]] == [(1, 0), (1, 1)]


def test_a_later_round_goes_to_ranks_with_less_work() -> None:
    work = no_work()
    with_owners([unit(64), unit(64), unit(64)], work)
    (last,) = with_owners([unit(32)], work)
    assert last.owner == (1, 1)


def test_rounds_are_of_whole_parameters() -> None:
    one, other, large = unit(8), unit(8), unit(64)
    split = [replace(large, start=0, end=2048), replace(large, start=2048, end=4096)]
    found = list(_rounds([one, other, *split, unit(8)], limit=200))
    assert [[piece.end - piece.start for piece in group] for group in found] == [[64, 64], [2048, 2048], [64]]


def test_flops_count_the_three_products() -> None:
    """Counted by torch for one iteration."""
    from torch.utils.flop_counter import FlopCounterMode

    for rows, columns in ((8, 20), (20, 8), (16, 16)):
        with FlopCounterMode(display=False) as counter:
            orthogonalized(torch.randn(1, rows, columns), steps=3, coefficients=COEFFICIENTS)
        assert counter.get_total_flops() == newton_schulz_flops(rows, columns, steps=3)


def test_an_update_has_the_size_of_adams() -> None:
    """rms * sqrt(max(R, C)) makes the root mean square of an orthogonal matrix of any shape 0.2."""
    for shape in ((64, 64), (16, 128), (128, 16)):
        matrix = torch.linalg.qr(torch.randn(max(shape), min(shape), dtype=torch.float64)).Q
        update = MuonConfig().rms * math.sqrt(max(shape)) * (matrix if shape[0] >= shape[1] else matrix.t())
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.5, 0.99)])
def test_adam_does_not_start_from_zero_with_a_slow_second_moment(betas: tuple[float, float]) -> None:
    from mmscale.errors import ConfigError

    with pytest.raises(ConfigError, match=r"times too large with optim\.beta1 = ") as caught:
        require_slow_start(betas)
    assert "--weights" in caught.value.remedy


def test_adam_may_start_from_zero_with_the_defaults() -> None:
    """The claim behind the rule: no update is larger than 1.5 times that of moments in equilibrium."""
    require_slow_start((0.9, 0.95))
    first = second = 0.0
    sizes = []
    for _ in range(200):
        first, second = 0.9 * first + 0.1, 0.95 * second + 0.05
        sizes.append(first / math.sqrt(second))
    assert max(sizes) < 1.15 and sizes[0] < 0.5
    assert all(one < other for one, other in pairwise(sizes[:10]))


def test_units_are_identified_by_themselves() -> None:
    one = unit(8)
    assert one != replace(one) and len({one, replace(one)}) == 2
