"""Muon in the plan: state, temporary memory, FLOPs and messages, counted by hand and with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.layers import model_tensors
from mmscale.layers.matrices import ROUND_COPIES, ROUND_ELEMENTS, is_hidden_matrix
from mmscale.plan import MessageKind, communication, count_parameters, rank_memory, sent_by_kind
from mmscale.plan.memory import checkpoint_bytes
from mmscale.plan.muon_cost import muon_cost
from mmscale.plan.timing import step_time
from mmscale.tables.gpus import gpu_named
from tests.distributed.layouts import config as small

ROOT = Path(__file__).parents[3]


def config(model: str = "moma", *, optimizer: str = "muon", parallel: dict[str, Any] | None = None) -> Config:
    return small(model, parallel=parallel, optim={"optimizer": optimizer})


def hidden(made: Config, *, experts: bool) -> int:
    """Elements of matrices of hidden layers: those of experts, or all others."""
    return sum(one.size for one in model_tensors(made) if is_hidden_matrix(one) and one.spread is experts)


@pytest.mark.parametrize("model", ["dense", "moma_7t1i", "mot"])
def test_matrices_have_one_moment(model: str) -> None:
    made, adam = config(model), config(model, optimizer="adamw")
    total = count_parameters(made).total
    matrices = hidden(made, experts=True) + hidden(made, experts=False)
    assert 0 < matrices < total
    assert rank_memory(made, 1).optimizer == 8 * total - 4 * matrices
    assert rank_memory(adam, 1).optimizer == 8 * total
    assert checkpoint_bytes(made, count_parameters(made)) == 16 * total - 4 * matrices
    assert checkpoint_bytes(adam, count_parameters(adam)) == 16 * total


def test_state_is_shared_like_adams() -> None:
    one, four = config(), config(parallel={"tp": 2, "ep": 2})
    parameters = count_parameters(one)
    whole = muon_cost(one, parameters, stage=0, world=1)
    part = muon_cost(four, parameters, stage=0, world=4)
    assert (whole.dense, whole.experts) == (hidden(one, experts=False), hidden(one, experts=True))
    assert part.shard == pytest.approx(whole.shard / 4)
    assert (part.dense, part.experts) == (whole.dense / 2, whole.experts / 4)
    assert muon_cost(config(optimizer="adamw"), parameters, stage=0, world=1).shard == 0


def test_flops_are_divided_but_no_matrix_is() -> None:
    parameters = count_parameters(config())
    costs = [muon_cost(config(), parameters, stage=0, world=world).flops for world in (1, 2, 4, 4096)]
    assert costs[1] == pytest.approx(costs[0] / 2) and costs[2] == pytest.approx(costs[0] / 4)
    # The gate and up projection of one expert, [64, 64] each, have one owner: five iterations.
    assert costs[3] == 2 * 5 * (4 * 64**3 + 2 * 64**3)


def test_temporary_memory_is_that_of_a_round() -> None:
    """Activations are freed before the update, so the larger of the two counts."""
    made = config()
    found = rank_memory(made, 1)
    matrices = hidden(made, experts=True) + hidden(made, experts=False)
    assert found.update == ROUND_COPIES * 4 * matrices
    assert found.total == found.states + max(found.activations + max(found.logits, found.working), found.update)
    assert rank_memory(config(optimizer="adamw"), 1).update == 0


def paper(*overrides: str) -> Config:
    """The paper's model of 7.16 B parameters."""
    from mmscale.config.load import load

    return load(ROOT / "configs" / "moma_1b4_4t4i.yaml", list(overrides))


def test_a_large_model_needs_rounds() -> None:
    made = paper("optim.optimizer=muon", "parallel.ep=4")
    assert rank_memory(made, 8).update == ROUND_COPIES * 4 * ROUND_ELEMENTS
    assert rank_memory(made, 8).optimizer < rank_memory(paper("parallel.ep=4"), 8).optimizer


def test_time_of_an_update_grows_and_bf16_is_faster() -> None:
    gpu, times = gpu_named("h100"), []
    for options in ((), ("optim.optimizer=muon",), ("optim.optimizer=muon", "optim.muon.dtype=bf16")):
        made = paper("parallel.ep=4", *options)
        times.append(step_time(made, 64, gpu, parameters=count_parameters(made)).optimizer)
    adam, fp32, bf16 = times
    assert adam < bf16 < fp32


def test_messages_are_momentum_and_updates_in_fp32() -> None:
    adam, muon = (config(optimizer=name, parallel={"tp": 2, "ep": 2}) for name in ("adamw", "muon"))
    before, after = (sent_by_kind(communication(made, 8)) for made in (adam, muon))
    dense, experts = hidden(muon, experts=False) / 2, hidden(muon, experts=True) / 4
    assert before[MessageKind.MUON] == 0
    assert after[MessageKind.MUON] == pytest.approx(2 * 4 * (dense / 4 * 3 / 4 + experts / 2 * 1 / 2))
    assert after[MessageKind.TP] - before[MessageKind.TP] == pytest.approx(2 * 4 * (dense / 4 + experts / 2) / 2)
    assert all(before[kind] == after[kind] for kind in MessageKind if kind not in (MessageKind.MUON, MessageKind.TP))
