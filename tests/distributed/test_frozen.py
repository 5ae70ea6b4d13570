"""`optim.freeze` in every kind of layout: frozen weights stay bit for bit, and the optimizer has no state for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint.shape import check_frozen
from mmscale.errors import CheckpointError
from mmscale.layers import TensorPart, model_tensors
from mmscale.layers.frozen import is_frozen
from mmscale.layers.matrices import is_hidden_matrix
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.layouts import FREEZE, config, start, trace
from tests.distributed.test_muon_layouts import with_optim
from tests.distributed.test_resume import leg, settings, tensors
from tests.support import run_ranks

STEPS = 3
OPTIMIZER = "optimizer.state."
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "mot_frozen": {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}},
    "moma_frozen": {"tp2": {"tp": 2}, "ep2": {"ep": 2}},
    "mot_4t1i_token_choice": {"tp2": {"tp": 2}, "ep2": {"ep": 2}},
}
# The optimizer of every change; `exhaustive` has the other one.
ALWAYS = {"mot_frozen": "muon", "moma_frozen": "adamw", "mot_4t1i_token_choice": "adamw"}
SHORT = "moma_frozen"  # the model of `make test`
assert ALWAYS.keys() == LAYOUTS.keys() == FREEZE.keys()


def _marks(model: str, always: bool) -> Any:
    if not always:
        return pytest.mark.exhaustive
    return () if model == SHORT else pytest.mark.long


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        pytest.param(model, optimizer, marks=_marks(model, optimizer == always))
        for model, always in ALWAYS.items()
        for optimizer in ("adamw", "muon")
    ],
)
def test_frozen_weights_stay_and_have_no_state(model: str, optimizer: str, tmp_path: Path) -> None:
    """With weight decay, and with biases of token choice, which would move otherwise."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for name, parallel in LAYOUTS[model].items():
            made = with_optim(settings(model, parallel=parallel), optimizer=optimizer)
            leg(made, tmp_path / name, load=None, until=1)
            leg(made, tmp_path / name, load=1, until=STEPS)
            before, after = tensors(tmp_path / name, 1), tensors(tmp_path / name, STEPS)
            for tensor in model_tensors(made):
                state = [key for key in after if key.startswith(OPTIMIZER) and key.endswith(f".{tensor.name}")]
                same = torch.equal(before[tensor.name], after[tensor.name])
                frozen = is_frozen(made, tensor)
                if frozen and tensor.part is TensorPart.BIAS:
                    assert not after[tensor.name].any(), (name, tensor.name)
                assert same if frozen else not (same and tensor.is_parameter), (name, tensor.name)
                stored = 2 if optimizer == "muon" and is_hidden_matrix(tensor) else 3  # the fp32 weight and the moments
                assert len(state) == (0 if frozen or not tensor.is_parameter else stored), (name, tensor.name, state)
        groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


def test_another_choice_needs_a_checkpoint_of_weights() -> None:
    made = config("mot_frozen")
    saved = made.model_dump(mode="json")
    check_frozen(made, {"config": saved, "contents": "training"}, where="here")
    other = config("mot")
    for one, info in ((other, saved), (made, other.model_dump(mode="json"))):
        with pytest.raises(CheckpointError, match=r"optim.freeze was \[.*\], is \[.*\]") as refused:
            check_frozen(one, {"config": info, "contents": "training"}, where="here")
        assert "from-hf" in str(refused.value.remedy)
        check_frozen(one, {"config": info, "contents": "weights"}, where="here")


def test_trials_of_a_layout_freeze_too(tmp_path: Path) -> None:
    """`mmscale verify-layout` and the layout matrix train what the run would train."""
    made = config(SHORT)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        trace(made, ranks, steps=1, saved=tmp_path)
        saved = tensors(tmp_path, 1)
        for tensor in model_tensors(made):
            state = [key for key in saved if key.startswith(OPTIMIZER) and key.endswith(f".{tensor.name}")]
            assert bool(state) == (tensor.is_parameter and not is_frozen(made, tensor)), tensor.name
        groups.finalize()

    run_ranks(ranks_do, world_size=1)
