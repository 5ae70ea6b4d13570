"""The grouped product of untied linears in FP8 over Transformer-Engine's Python: against emulated FP8, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor, nn

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.model.build import build_chunks
from mmscale.model.capacity import TokenCounts
from mmscale.model.fp8_emulate import Fp8Rows
from mmscale.model.fp8_recipe import Recipe
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.untied import product, rows_of
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.layouts import config, start
from tests.support import run_ranks
from tests.te_on_cpu.checks_untied_fp8 import in_fp8, on_torch
from tests.te_on_cpu.over_te import can_run  # noqa: F401  a fixture


def params_of(ids: list[int]) -> MixedModalParams:
    """One sequence of tokens of these modalities, whose counts the host knows."""
    modality_ids = torch.tensor([ids], dtype=torch.int8)
    own = np.array([[ids.count(0), ids.count(1)]])
    places = torch.arange(len(ids)).unsqueeze(0)
    return MixedModalParams.of(
        modality_ids=modality_ids,
        position_ids=places,
        document_ids=torch.zeros_like(modality_ids, dtype=torch.int32),
        counts=TokenCounts(own, own[None]),
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("ids", [[0, 1, 1] * 16, [0] * 32, [1, -1, 0] * 11], ids=["mixed", "one modality", "padding"])
def test_the_product_of_each_modality_is_the_emulated_one(recipe: str, ids: list[int]) -> None:
    """Output, gradient of the rows and of every weight; numbers of rows are no multiples of 16."""

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        made = in_fp8("mot", recipe)
        chunk = build_chunks(made, groups)[0]
        linear, params = chunk.decoder.layers[0].mlp.linear_fc1, params_of(ids)
        torch.manual_seed(1)
        rows = torch.randn(len(ids), 1, linear.text.shape[1], dtype=torch.bfloat16)
        back = torch.randn(len(ids), 1, linear.text.shape[0], dtype=torch.bfloat16)
        own = Recipe.of(on_torch(made))
        multiply = [Fp8Rows(own, groups), Fp8Rows(own, groups)]

        def plain(tokens: Tensor) -> Tensor:
            found = product(tokens.flatten(0, 1), linear.weights, rows_of(params, 2), multiply=multiply)
            return found.unflatten(0, tokens.shape[:2])

        def grouped(tokens: Tensor) -> Tensor:
            linear.see(params, 0)
            with get_fp8_context(chunk.config):
                return linear(tokens)[0]  # type: ignore[no-any-return]

        expected, found = (_with_gradients(multiply, rows, back, linear) for multiply in (plain, grouped))
        for name, value in expected.items():
            error = (found[name].float() - value.float()).norm()
            assert error <= 2**-8 * value.float().norm(), (name, error, value.norm())
        assert all(torch.equal(found["image"], torch.zeros_like(found["image"])) for _ in [0] if 1 not in ids)

    run_ranks(one, world_size=1)


def _with_gradients(multiply: Any, rows: Tensor, back: Tensor, linear: nn.Module) -> dict[str, Tensor]:
    tokens = rows.clone().requires_grad_()
    linear.zero_grad()
    out = multiply(tokens)
    out.backward(back)
    weights = {name: weight.grad.clone() for name, weight in linear.named_parameters() if weight.grad is not None}
    assert tokens.grad is not None and weights.keys() == {"text", "image"}
    return {"output": out.detach(), "rows": tokens.grad, **weights}


def test_bounds_of_rows_where_the_device_chooses() -> None:
    from mmscale.model.untied_te import padded_rows

    params = params_of([0, 1, 1, 0, 1] * 4).select(torch.arange(10).unsqueeze(1))
    assert params.counts is not None and params.counts.rows(10) is None
    places, sizes = padded_rows(params, rows_of(params, 2), 16)
    assert sizes == [16, 16]  # at most 8 of the first modality, at most 10 of the last
    assert places.tolist() == [0, 16, 17, 1, 18, 2, 19, 20, 3, 21]
    exact, sizes = padded_rows(params_of([0] * 17 + [1] * 3), rows_of(params_of([0] * 17 + [1] * 3), 2), 16)
    assert sizes == [32, 16] and exact.tolist() == [*range(17), 32, 33, 34]


def test_auto_is_transformer_engine_in_fp8() -> None:
    from mmscale.model.untied_te import GroupedColumnLinear

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        for made, wanted in ((in_fp8("mot", "tensorwise"), True), (config("mot", dtype="bf16"), False)):
            auto = made.model_copy(update={"model": made.model.model_copy(update={"backend": "auto"})})
            linear = build_chunks(auto, groups)[0].decoder.layers[0].mlp.linear_fc1
            assert (type(linear) is GroupedColumnLinear) == wanted

    run_ranks(one, world_size=1)
