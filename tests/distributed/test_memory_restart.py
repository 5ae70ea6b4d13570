"""A run goes on bit by bit from snapshots in memory, with the memory of one rank lost, in several layouts."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.state import local_state
from mmscale.train.state.train_state import TrainState
from tests.distributed import test_memory_tier
from tests.distributed.memory_tiers import events, folders, lose, started, tier
from tests.distributed.test_resume import OVERLAPPED, settings, start, train
from tests.support import run_ranks

place = test_memory_tier.place  # the fixture


@pytest.mark.parametrize(
    ("model", "dtype", "parallel", "world", "optim"),
    [
        pytest.param("moma_depth_joint", "fp32", {"ep": 2}, 4, {}, marks=pytest.mark.long),
        pytest.param("moma", "bf16", {"tp": 2, "pp": 2}, 4, {}, marks=pytest.mark.exhaustive),
        pytest.param(*("dense", "bf16", OVERLAPPED, 2, {"moments": "bf16"}), marks=pytest.mark.long),
        ("moe", "fp32", {"pp": 2, "vpp": 2}, 2, {"moments": "fp8_coat"}),
        pytest.param("moma", "bf16", {"tp": 2}, 2, {"optimizer": "muon"}, marks=pytest.mark.long),
        ("moma_token_choice", "fp32", {"ep": 2}, 2, {}),
        pytest.param("moma_depth_joint", "bf16", {"cp": 2, "ep": 2}, 2, {}, marks=pytest.mark.long),
    ],
)
def test_a_restart_from_memory_goes_on_bit_by_bit(
    place: Path, model: str, dtype: str, parallel: dict[str, Any], world: int, optim: dict[str, Any]
) -> None:
    """Two steps, a snapshot, two more; then another life with the memory of one rank lost: the same two more."""
    config = settings(model, dtype=dtype, parallel=parallel)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dropout": 0.1}),
            "optim": config.optim.model_copy(update=optim),
        }
    )

    def life(name: str, ranks: RankEnv) -> None:
        start(ranks)
        layout = config.parallel
        groups = process_groups.initialize_layout(
            tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, cp=layout.cp, seed=config.run.seed
        )
        parts = build(config, groups)
        state = TrainState(parts.chunks, parts.optimizer, routers=parts.routers)
        made = tier(ranks, place, attempt=1 if name == "first" else 2)
        if name == "first":
            started(made, place)
            train(config, parts, state, until=2)
            assert made.snapshot(state.step, *local_state.capture(state)) and made.wait()
        else:
            torch.manual_seed(99)
            found = made.restore(above=0, accept=lambda *got: local_state.problems(state, *got))
            assert found is not None and found[0] == 2, events(place)
            assert local_state.problems(state, {}, {}) and local_state.problems(state, found[1], {})
            others = {name: value.double() if "exp_avg" in name else value for name, value in found[1].items()}
            assert any("optim.moments" in problem for problem in local_state.problems(state, others, found[2]))
            local_state.restore(state, found[1], found[2])
            assert state.step == 2
            made.close()
        taken = train(config, parts, state, until=4)
        with parts.stepper.materialized():
            weights = [
                hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
                for chunk in parts.chunks
                for parameter in chunk.parameters()
            ]
        (place / f"{name}_{ranks.rank}").write_text(json.dumps([taken.losses, taken.norms, weights]))
        torch.distributed.barrier()
        if name == "first":
            os._exit(0)
        process_groups.finalize()

    run_ranks(functools.partial(life, "first"), world_size=world)
    lose(folders(place)[1])
    run_ranks(functools.partial(life, "second"), world_size=world)
    for rank in range(world):
        assert (place / f"first_{rank}").read_text() == (place / f"second_{rank}").read_text()
