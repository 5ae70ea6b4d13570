"""Weights for each modality in FP8 over Transformer-Engine's grouped products: against emulated FP8 and bf16."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config, ParallelConfig
from mmscale.config.rules import violations
from mmscale.model.choices import Choices
from mmscale.model.state_te import scaled_modules
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.verify_layout import Trace, compare, compare_tensors, tolerance_of, verdict
from mmscale.train.state.train_state import TrainState, unwrapped
from mmscale.train.steps.fp8_scales import scales_of
from tests.distributed.layouts import assert_passes, config, start, trace
from tests.distributed.test_resume import _ignore_event, leg, settings
from tests.support import run_ranks
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


def in_fp8(model: str, recipe: str, **parallel: Any) -> Config:
    """A small model with a recipe, of widths that it takes under a layout."""
    made = small(config(model, dtype="bf16", parallel=parallel, data=PADDED if "cp" in parallel else {}))
    made = in_whole_blocks(made) if recipe == "blockwise" else made
    return using(made, "te", fp8=recipe)


def on_torch(made: Config) -> Config:
    """The same with emulated FP8."""
    return using(made, "torch", fp8_emulate=True)


def alone(made: Config, folder: Path, *, like: Path | None = None) -> Trace:
    """The trace of one process, and in a folder its checkpoint after the first step, with the choices of that step.

    Another order of summation lets Mixture-of-Depths layers choose other tokens, which is seen as 2 % of the gradient
    norm and two thirds of a depth router's gradient, in bf16 as in FP8, untied or not. So the first step of other runs
    repeats its choices: those in the folder `like`.
    """
    file = folder / "found.json"
    if not file.exists():

        def make(ranks: RankEnv) -> None:
            start(ranks)
            choices = Choices((folder if like is None else like) / "choices", repeat=like is not None)
            found = trace(made.model_copy(update={"parallel": ParallelConfig()}), ranks, saved=folder, choices=choices)
            if like is None:
                choices.save()
            file.write_text(json.dumps([found.losses, found.grad_norms]))

        run_ranks(make, world_size=1)
    losses, norms = json.loads(file.read_text())
    return Trace(tuple(losses), tuple(norms))


def assert_one_process(model: str, layouts: Iterable[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Tensor by tensor after a step, for layouts of two ranks; and one process is near emulated FP8 and bf16."""
    chosen = [(in_fp8(model, recipe, **parallel), f"{recipe} {parallel}") for recipe, parallel in layouts]

    def of(made: Config, beside: str = "") -> Path:
        kind = f"{made.model.backend}_{made.precision.fp8}{beside}"
        return folder / f"{kind}_{made.model.hidden_size}_{made.parallel.cp}"

    for made, name in chosen:
        assert violations(made, world_size=2) == [], name
        own, steps = alone(made, of(made)), 1 if made.model.depth else None
        for other in (on_torch(made), using(made, "te", fp8="off")):
            found = alone(other, of(other, f"_beside_{made.precision.fp8}"), like=of(made))
            loss, norm = compare(_first(found, steps), _first(own, steps))
            assert 0.0 < loss < 0.02 and norm < 0.05, (name, other.precision.fp8, loss, norm)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (made, name) in enumerate(chosen):
            saved, own = of(made), folder / f"{number}"
            choices = Choices(saved / "choices", repeat=True)
            CALLS.clear()
            found = trace(made, ranks, saved=own, reference=saved, choices=choices)
            assert CALLS[GROUPED] > 0, (name, CALLS)
            allowed = tolerance_of(made)
            tensors = compare_tensors(saved, own, tolerance=allowed) if ranks.rank == 0 else None
            tensors = process_groups.from_first(tensors)
            result = verdict(made, reference=alone(made, saved), trace=found, tensors=tensors)
            if made.model.depth is None:
                assert_passes(result, name)
                continue
            # Only the first step repeats the choices. The others are near, as those of other models in FP8.
            assert result["loss_difference"] < 0.02 and result["grad_norm_difference"] < 0.05, (name, result)
            assert result["gradients"]["differ"] == result["state"]["differ"] == [], (name, result)

    run_ranks(ranks_do, world_size=2, timeout_s=600)


def _first(found: Trace, steps: int | None) -> Trace:
    return Trace(found.losses[:steps], found.grad_norms[:steps])


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_layout_is_one_process(model: str, tmp_path: Path) -> None:
    assert_one_process(model, LAYOUTS[model], tmp_path)


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
