"""Layouts x models x precisions over Transformer-Engine's Python: fp32 against the torch backend, FP8 against bf16.

Too slow for every change: `make test-all`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.config import Config
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import compare
from tests.distributed.layouts import References, assert_equal, config, trace
from tests.distributed.test_resume import TOLERANCE, leg, settings, start
from tests.support import run_ranks
from tests.te_on_cpu import checks_layouts as layouts
from tests.te_on_cpu import checks_untied_fp8 as untied
from tests.te_on_cpu.checks_layouts import references  # noqa: F401  a fixture
from tests.te_on_cpu.over_te import can_run, in_whole_blocks, small, using  # noqa: F401  a fixture

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "full recompute": (1, {"recompute": "full"}),
    "selective recompute": (1, {"recompute": "selective"}),
    "tp2 full recompute": (2, {"tp": 2, "recompute": "full"}),
}
MODELS = ("moma", "moma_depth", "dense", "moma_post_per_expert_shared")


def _made(model: str, layout: str, *, dtype: str = "bf16", fp8: str = "off") -> Config:
    made = config(model, dtype=dtype, parallel=LAYOUTS[layout][1])
    if fp8 == "blockwise" and made.parallel.tp > 1:
        made = in_whole_blocks(made)
    return using(small(made), "te", fp8=fp8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_is_the_torch_backend(layout: str) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for model in MODELS:
            if model == "dense" and LAYOUTS[layout][1].get("ep"):
                continue  # there are no experts to distribute
            made = _made(model, layout, dtype="fp32")
            assert_equal(trace(using(made, "torch"), ranks), trace(made, ranks), f"{model} {layout}")

    run_ranks(ranks_do, world_size=LAYOUTS[layout][0], timeout_s=400)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_is_near_bf16(layout: str) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for model in MODELS[:2]:
            for recipe in RECIPES:
                made = _made(model, layout, fp8=recipe)
                loss, norm = compare(trace(using(made, "te", fp8="off"), ranks), trace(made, ranks))
                assert 0.0 < loss < 0.02 and norm < 0.05, (model, layout, recipe, loss, norm)

    run_ranks(ranks_do, world_size=LAYOUTS[layout][0], timeout_s=600)


def _uneven(world_size: int, *, all_of_them: bool) -> list[str]:
    names = [name for name, (size, *_) in layouts.UNEVEN.items() if size == world_size]
    return names if all_of_them else [name for name in names if name not in layouts.EVERY_CHANGE]


@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_layouts_in_fp32_are_one_process(references: References, world_size: int, tmp_path: Path) -> None:  # noqa: F811
    names = _uneven(world_size, all_of_them=False)
    layouts.assert_one_process(references, names, tmp_path, world_size=world_size)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_layouts_in_fp8_are_near_bf16(world_size: int, recipe: str) -> None:
    layouts.assert_fp8_near_bf16(_uneven(world_size, all_of_them=True), recipe, world_size=world_size)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", untied.OTHERS)
def test_untied_models_in_fp8_are_one_process(model: str, recipe: str, tmp_path: Path) -> None:
    untied.assert_one_process(model, [(recipe, parallel) for parallel in untied.OTHERS[model]], tmp_path)


def test_a_dense_run_may_change_its_backend(tmp_path: Path) -> None:
    def two(ranks: RankEnv) -> None:
        start(ranks)
        made = settings("dense", parallel={"tp": 2})
        whole = leg(using(made, "torch"), tmp_path / "whole", load=None, until=3)
        halves = leg(using(made, "torch"), tmp_path / "halves", load=None, until=2)
        halves += leg(using(made, "te"), tmp_path / "halves", load=2, until=3)
        assert halves.losses == pytest.approx(whole.losses, rel=TOLERANCE)

    run_ranks(two, world_size=2)
