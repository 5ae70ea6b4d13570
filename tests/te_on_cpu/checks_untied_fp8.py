"""Weights for each modality in FP8 over Transformer-Engine's grouped products: against emulated FP8 and bf16."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor, nn

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.config.rules import violations
from mmscale.model.build import build_chunks
from mmscale.model.capacity import TokenCounts
from mmscale.model.fp8_emulate import Fp8Rows
from mmscale.model.fp8_recipe import Recipe
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.state_te import scaled_modules
from mmscale.model.untied import product, rows_of
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.verify_layout import compare, compare_tensors, tolerance_of, verdict
from mmscale.train.state.train_state import TrainState, unwrapped
from mmscale.train.steps.fp8_scales import scales_of
from tests.distributed.layouts import References, assert_passes, config, start, trace
from tests.distributed.test_resume import _ignore_event, leg, settings
from tests.support import run_ranks
from tests.te_on_cpu.checks_layouts import references  # noqa: F401  a fixture
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.over_te import can_run, in_whole_blocks, small, using  # noqa: F401  a fixture

PADDED = {"document_multiple": 8}
GROUPED = "te_general_grouped_gemm"
TP2, CP2 = {"tp": 2}, {"cp": 2}
# Recipes with layouts of two ranks. checks_matrix.py has the others.
LAYOUTS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "mot": (
        *(("delayed", parallel) for parallel in ({}, TP2, {"pp": 2}, {"tp": 2, "recompute": "full"})),
        *(("tensorwise", parallel) for parallel in (TP2, CP2, {"recompute": "selective"})),
        ("blockwise", TP2),
    ),
    "mot_post_depth": (("delayed", TP2), ("tensorwise", CP2)),
    "moma_untied": (("delayed", {"ep": 2}), ("tensorwise", TP2)),
}
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {
    "mot": ({}, TP2, {"pp": 2}, CP2, {"tp": 2, "recompute": "full"}, {"recompute": "selective"}),
    "mot_post_depth": ({}, TP2, {"pp": 2}, CP2),
    "moma_untied": ({}, {"ep": 2}, TP2, {"pp": 2}, CP2),
}


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


def in_fp8(model: str, recipe: str, **parallel: Any) -> Config:
    """A small model with a recipe, of widths that it takes under a layout."""
    made = small(config(model, dtype="bf16", parallel=parallel, data=PADDED if "cp" in parallel else {}))
    made = in_whole_blocks(made) if recipe == "blockwise" else made
    return using(made, "te", fp8=recipe)


def on_torch(made: Config) -> Config:
    """The same with emulated FP8."""
    return using(made, "torch", fp8_emulate=True)


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


def assert_one_process(
    references: References,  # noqa: F811
    model: str,
    layouts: Iterable[tuple[str, dict[str, Any]]],
    folder: Path,
) -> None:
    """Tensor by tensor after a step, for layouts of two ranks; and one process is near emulated FP8 and bf16."""
    chosen = [(in_fp8(model, recipe, **parallel), f"{recipe} {parallel}") for recipe, parallel in layouts]
    for made, name in chosen:
        assert violations(made, world_size=2) == [], name
        references.get(made)
        if made.parallel.cp == 1:
            for other in (on_torch(made), using(made, "te", fp8="off")):
                loss, norm = compare(references.get(other), references.get(made))
                assert 0.0 < loss < 0.02 and norm < 0.05, (name, other.precision.fp8, loss, norm)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (made, name) in enumerate(chosen):
            saved, own = references.checkpoint(made), folder / f"{number}"
            CALLS.clear()
            found = trace(made, ranks, saved=own, reference=saved)
            assert CALLS[GROUPED] > 0, (name, CALLS)
            allowed = tolerance_of(made)
            tensors = compare_tensors(saved, own, tolerance=allowed) if ranks.rank == 0 else None
            tensors = process_groups.from_first(tensors)
            assert_passes(verdict(made, reference=references.get(made), trace=found, tensors=tensors), name)

    run_ranks(ranks_do, world_size=2, timeout_s=600)


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_layout_is_one_process(model: str, references: References, tmp_path: Path) -> None:  # noqa: F811
    assert_one_process(references, model, LAYOUTS[model], tmp_path)


@pytest.mark.parametrize(("model", "recipe"), [("moma_untied", "delayed"), ("mot", "tensorwise")])
def test_a_stopped_run_goes_on_exactly(model: str, recipe: str, tmp_path: Path) -> None:
    def two(ranks: RankEnv) -> None:
        start(ranks)
        made = small(settings(model, dtype="bf16", parallel={"tp": 2}), num_layers=2)
        made = using(made, "te", fp8=recipe, fp8_amax_history=3)
        whole = leg(made, tmp_path / "whole", load=None, until=3)
        halves = leg(made, tmp_path / "half", load=None, until=2) + leg(made, tmp_path / "half", load=2, until=3)
        assert whole == halves, (whole, halves)

    run_ranks(two, world_size=2, timeout_s=300)


def test_delayed_scales_go_from_backend_to_backend(tmp_path: Path) -> None:
    """Written by Transformer-Engine, read and written by the emulation, read by the former in another layout."""

    def made(parallel: dict[str, int], backend: str) -> Config:
        found = small(settings("mot", dtype="bf16", parallel=parallel), num_layers=2)
        found = using(found, "te", fp8="delayed", fp8_amax_history=5)
        return on_torch(found) if backend == "torch" else found

    def expected(name: str) -> Tensor:
        return torch.arange(6 * 5).view(6, 1, 5).float() + 1 + len(name) + 100 * (name.endswith("image"))

    def check(state: TrainState, *, fill: bool) -> int:
        chunk, seen = unwrapped(state.chunks[0]), 0
        for name, module in scaled_modules(chunk):
            names = [f"{name}.{modality}" for modality in ("text", "image")]
            states = torch.cat([expected(one) for one in names], dim=1)
            if fill:
                module.set_fp8_state(states)
            assert torch.equal(module.fp8_state(), states), name
            seen += 2
        for scales in scales_of(state.chunks):
            assert torch.equal(scales.state, expected(scales.name)), scales.name
            seen += 1
        return seen

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        chain: Any = (({}, "te"), ({}, "torch"), ({"tp": 2}, "te"))
        for turn, (parallel, backend) in enumerate(chain):
            one = made(parallel, backend)
            groups = process_groups.initialize_layout(tp=one.parallel.tp)
            state = TrainState(build(one, groups).chunks, None)
            options: Any = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": _ignore_event}
            checkpoints = CheckpointManager(tmp_path, **options)
            if turn:
                checkpoints.load(state, turn)
            # Four linears in each of two layers, and two modalities.
            assert check(state, fill=turn == 0) == 2 * 4 * 2, (parallel, backend)
            state.step = turn + 1
            checkpoints.save(state, last=True)
            process_groups.destroy_layout()

    run_ranks(ranks_do, world_size=2)


def test_a_run_may_change_its_backend(tmp_path: Path) -> None:
    """To emulated FP8 and back: losses near those of the run that changed nothing."""

    def one(ranks: RankEnv) -> None:
        start(ranks)
        for recipe in ("delayed", "tensorwise"):
            made = using(small(settings("mot", dtype="bf16"), num_layers=2), "te", fp8=recipe, fp8_amax_history=4)
            folder, at, losses = tmp_path / recipe, None, ()
            reference = leg(made, folder / "same", load=None, until=4)
            for part, until in ((made, 2), (on_torch(made), 3), (made, 4)):
                found = leg(part, folder / "changed", load=at, until=until)
                at, losses = until, losses + found.losses
            assert losses[:2] == reference.losses[:2]
            assert losses == pytest.approx(reference.losses, abs=0.02), recipe

    run_ranks(one, world_size=1, timeout_s=300)


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
