"""Loss-based weights: every parallel layout equals one process, and a resumed run equals one that was not interrupted.

The first step is already weighted, so that the gradient of every tensor is compared under weights; tolerances are those
of test_layouts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.trial import SAVED_STEP, Trace, Trial
from mmscale.train.proof.verify_layout import compare_tensors, verdict
from mmscale.train.state import local_state
from tests.distributed.layouts import assert_passes, start
from tests.distributed.layouts import config as plain_config
from tests.support import run_ranks

STEPS = 4
# Of each modality: low and high near the loss of an untrained model of 128 ids, mean, updates.
AVERAGES = [[4.7, 5.0, 0.5, 9.0], [4.75, 5.05, 0.4, 9.0]]
WEIGHTS = {"temperature": 0.4, "largest": 2.0, "warmup": 4}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": {},
        "tp2": {"tp": 2},
        "tp2_chunked": {"tp": 2, "loss_chunk": 16},
        "pp2": {"pp": 2},
        "ep2": {"ep": 2},
        "cp2": {"cp": 2},
        "pp2_interleaved": {"pp": 2, "vpp": 2},
    },
    4: {
        "tp2_dp2": {"tp": 2},
        "tp2_ep2": {"tp": 2, "ep": 2},
        "pp2_dp2": {"pp": 2},
        "cp2_dp2": {"cp": 2},
        "cp2_tp2": {"cp": 2, "tp": 2},
    },
}


def config(model: str, **options: Any) -> Config:
    return plain_config(model, data={"document_multiple": 8}, loss_weights=WEIGHTS, **options)


def weighted(made: Config, folder: Path, reference: Path | None = None) -> tuple[Trace, list[list[float]]]:
    """Steps from averages that are there already; after the first one as in `take_steps`."""
    parallel = made.parallel
    groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=made.run.seed
    )
    try:
        trial = Trial(made)
        weights = trial._state.loss_weights
        assert weights is not None
        weights.restore(AVERAGES)
        found = trial.train(SAVED_STEP)
        trial.save(folder)
        if reference is not None:
            trial.load(reference, SAVED_STEP)
        return found + trial.train(STEPS - SAVED_STEP), weights.plain()
    finally:
        groups.destroy_layout()


def equals_one_process(
    model: str,
    world_size: int,
    folder: Path,
    config: Callable[..., Config] = config,
    names: Sequence[str] | None = None,
) -> None:
    """All layouts, or those with some names; `config` makes the settings of a model and a layout."""

    def alone(ranks: RankEnv) -> None:
        start(ranks)
        found, averages = weighted(config(model), folder / "alone")
        (folder / "alone.json").write_text(json.dumps([found.losses, found.grad_norms, averages]))
        groups.finalize()

    run_ranks(alone, world_size=1)
    losses, norms, averages = json.loads((folder / "alone.json").read_text())
    assert all(row[3] == 9.0 + STEPS for row in averages)

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name, parallel in LAYOUTS[world_size].items():
            if names is not None and name not in names:
                continue
            if "ep" in parallel and model.startswith(("dense", "mot")):
                continue
            made = config(model, parallel=parallel)
            found, own = weighted(made, folder / name, reference=folder / "alone")
            tensors = groups.from_first(compare_tensors(folder / "alone", folder / name) if ranks.rank == 0 else None)
            judged = verdict(made, reference=Trace(tuple(losses), tuple(norms)), trace=found, tensors=tensors)
            assert_passes(judged, f"{model} {name}")
            np.testing.assert_allclose(own, averages, rtol=2e-6, err_msg=name)
        groups.finalize()

    run_ranks(steps, world_size=world_size, timeout_s=600)


@pytest.mark.parametrize(
    ("model", "world_size"),
    [
        pytest.param("moma", 2, marks=pytest.mark.long),
        *(
            pytest.param(model, size, marks=pytest.mark.exhaustive)
            for model in ("dense_tied", "moma", "moma_token_choice", "mot", "moma_frozen")
            for size in LAYOUTS
            if (model, size) != ("moma", 2)
        ),
    ],
)
def test_layouts_equal_one_process(model: str, world_size: int, tmp_path: Path) -> None:
    equals_one_process(model, world_size, tmp_path)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """From a checkpoint and from a snapshot of the memory tier, with two data-parallel ranks."""

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        made = config("moma")
        groups.initialize_layout(seed=made.run.seed)
        trial = Trial(made)
        state = trial._state
        assert state.loss_weights is not None
        state.loss_weights.restore(AVERAGES)
        trial.train(SAVED_STEP)
        trial.save(tmp_path / "one")
        tensors, plain = local_state.capture(state)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain))
        whole = trial.train(STEPS), state.loss_weights.plain()
        trial.load(tmp_path / "one", SAVED_STEP)
        assert (trial.train(STEPS), state.loss_weights.plain()) == whole
        assert local_state.problems(state, *kept) == []
        local_state.restore(state, *kept)
        assert (trial.train(STEPS), state.loss_weights.plain()) == whole
        groups.destroy_layout()
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=300)
