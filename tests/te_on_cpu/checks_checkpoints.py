"""Checkpoints of runs over Transformer-Engine's Python: other backends and layouts, FP8 state, moments of its Adam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config import Config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables import settings as tables
from tests.distributed.test_resume import TOLERANCE, assert_weights_are_newest, leg, settings, start, tensors
from tests.support import run_ranks
from tests.te_on_cpu.over_te import can_run, small, using  # noqa: F401  a fixture

MOMENTS = tuple(tables.MOMENTS)


@pytest.mark.parametrize("optimizer", list(tables.OPTIMIZERS))
def test_a_run_may_change_its_backend_and_its_layout(tmp_path: Path, optimizer: str) -> None:
    """To Transformer-Engine and back, with other layouts: the numbers of the run that changed nothing.

    Transformer-Engine has a parameter for each expert, stored as (out, in): Muon finds the same matrices there.
    """
    chains: Any = {
        "moma": (("torch", {"ep": 2}, 2), ("te", {"tp": 2}, 3), ("torch", {"ep": 2}, 4)),
    }

    def made(model: str, parallel: dict[str, int], backend: str) -> Config:
        found = using(settings(model, parallel=parallel), backend)
        return found.model_copy(update={"optim": found.optim.model_copy(update={"optimizer": optimizer})})

    def ranks_of_two(ranks: RankEnv) -> None:
        start(ranks)
        for model, chain in chains.items():
            same, changed = tmp_path / f"{model}_same", tmp_path / f"{model}_changed"
            reference = leg(made(model, chain[0][1], "torch"), same, load=None, until=chain[-1][2])
            at, losses, norms = None, (), ()
            for backend, parallel, until in chain:
                found = leg(made(model, parallel, backend), changed, load=at, until=until)
                at, losses, norms = until, losses + found.losses, norms + found.norms
            assert losses == pytest.approx(reference.losses, rel=TOLERANCE), model
            assert norms == pytest.approx(reference.norms, rel=10 * TOLERANCE), model
            # The same names and shapes, whoever wrote it.
            wrote = tensors(changed, 3)
            assert {k: v.shape for k, v in wrote.items()} == {k: v.shape for k, v in tensors(changed, 2).items()}

    run_ranks(ranks_of_two, world_size=2)


GO_ON: dict[str, dict[str, Any]] = {
    "te_bf16": {"moments": "te_bf16"},
    "te_fp8": {"moments": "te_fp8"},
    "delayed": {"fp8": "delayed", "fp8_amax_history": 3},
    "first and last layer in bf16": {"fp8": "tensorwise", "fp8_skip_first": 1, "fp8_skip_last": 1},
}


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    def one(ranks: RankEnv) -> None:
        start(ranks)
        for name, options in GO_ON.items():
            made = using(small(settings("moma", dtype="bf16"), num_layers=3), "te", **options)
            whole = leg(made, tmp_path / f"{name}_whole", load=None, until=3)
            halves = leg(made, tmp_path / name, load=None, until=2) + leg(made, tmp_path / name, load=2, until=3)
            assert whole == halves, (name, whole, halves)

    run_ranks(one, world_size=1, timeout_s=600)


def test_every_setting_of_moments_reads_every_other(tmp_path: Path) -> None:
    """Written with one, read with another: the next losses are those of the run that changed nothing."""
    assert len(MOMENTS) == 5

    def made(moments: str) -> Config:
        return using(small(settings("dense", dtype="bf16"), num_layers=1), "te", moments=moments)

    def one(ranks: RankEnv) -> None:
        start(ranks)
        for wrote in MOMENTS:
            leg(made(wrote), tmp_path / wrote, load=None, until=1)
            process_groups.initialize_layout(seed=1)
            saved = tensors(tmp_path / wrote, 1)
            process_groups.destroy_layout()
            assert_weights_are_newest(saved)
            masters = {value.dtype for name, value in saved.items() if name.startswith("optimizer.state.param.")}
            assert masters == {torch.float32}, (wrote, masters)
            own = leg(made(wrote), tmp_path / wrote, load=1, until=3)
            for reads in MOMENTS:
                if reads != wrote:
                    found = leg(made(reads), tmp_path / wrote, load=1, until=3)
                    # The first loss has seen the weights; the second, the moments that were read.
                    assert found.losses[0] == own.losses[0], (wrote, reads)
                    assert found.losses == pytest.approx(own.losses, rel=1e-3), (wrote, reads)
                    assert found.norms == pytest.approx(own.norms, rel=1e-2), (wrote, reads)

    run_ranks(one, world_size=1, timeout_s=300)


@pytest.mark.parametrize(("model", "products"), [("moma", 8), ("moma_7t1i", 8)])
def test_scales_of_delayed_fp8_survive_another_layout(model: str, products: int, tmp_path: Path) -> None:
    """Every module's scales and histories come back as they were, experts' with their expert, whatever the layout."""
    from mmscale.model.experts_te import TEExperts
    from mmscale.model.state_te import scaled_modules

    from mmscale.train.state import local_state  # isort: skip
    from mmscale.train.state.train_state import TrainState, unwrapped  # isort: skip

    def modules(state: TrainState) -> list[tuple[str, Any, int]]:
        """Name, linear and the number of its first product among those of all expert-parallel ranks."""
        model = unwrapped(state.chunks[0])
        first = {
            linear: experts.own.start
            for experts in model.modules()
            if isinstance(experts, TEExperts)
            for linear in (experts.linear_fc1, experts.linear_fc2)
        }
        return [(name, module, first.get(module, 0)) for name, module in scaled_modules(model)]

    def fp8(parallel: dict[str, int]) -> Config:
        made = using(small(settings(model, dtype="bf16", parallel=parallel), num_layers=2), "te")
        precision = made.precision.model_copy(update={"fp8": "delayed", "fp8_amax_history": 5})
        return made.model_copy(update={"precision": precision})

    def expected(name: str, module: Any, first: int) -> torch.Tensor:
        numbers = torch.arange(1000).view(1, -1)[:, first : first + module.products]
        return (torch.arange(6 * 5).view(6, 1, 5) + 100 * numbers.unsqueeze(-1)).float() + len(name)

    def ranks_of_two(ranks: RankEnv) -> None:
        from mmscale.checkpoint.manager import CheckpointManager
        from mmscale.train.assembly import build
        from tests.distributed.test_resume import _ignore_event

        start(ranks)
        options: Any = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": _ignore_event}
        for turn, parallel in enumerate(({"ep": 2}, {}, {"tp": 2}, "torch")):
            made = fp8(parallel) if isinstance(parallel, dict) else using(fp8({}), "torch", fp8="off")
            layout = made.parallel
            groups = process_groups.initialize_layout(tp=layout.tp, ep=layout.ep)
            parts = build(made, groups)
            state = TrainState(parts.chunks, None)
            checkpoints = CheckpointManager(tmp_path, **options)
            if turn == 0:
                found = modules(state)
                held = sum(module.products for name, module, _ in found if ".experts." in name)
                assert (
                    held == 2 * 2 * products // 2
                )  # two linears of each expert in each of 2 layers, half of them here
                for name, module, first in found:
                    module.set_fp8_state(expected(name, module, first))
                state.step = 2
                checkpoints.save(state, last=True)
            else:
                checkpoints.load(state, 2)
            if turn == 1:  # a snapshot in memory brings them into a new model too
                tensors, plain = local_state.capture(TrainState(parts.chunks, parts.optimizer))
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                parts = build(made, groups)
                state = TrainState(parts.chunks, parts.optimizer)
                assert local_state.problems(state, tensors, plain) == []
                local_state.restore(state, tensors, plain)
            for name, module, first in modules(state):
                assert torch.equal(module.fp8_state(), expected(name, module, first)), (turn, name)
            process_groups.destroy_layout()

    run_ranks(ranks_of_two, world_size=2)
