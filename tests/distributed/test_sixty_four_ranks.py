"""64 ranks of the 1.4B class in one process: groups, what a rank holds and what it says, against `mmscale plan`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config import Config
from mmscale.config.derived import data_parallel_size, dense_replicas
from mmscale.config.load import load
from mmscale.plan.communication import Operation, communication
from mmscale.plan.memory import stages_memory
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.collectives import Collectives
from tests.distributed.fake_world import one_step, rank_of, states_of
from tests.support import run_ranks

WORLD = 64
RECIPE = Path(__file__).parents[2] / "configs" / "moma_1b4_4t4i.yaml"
_OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Buffers are padded so that every shard has equally many elements, and starts at a multiple of 128 bytes.
PADDING = 2e-4
# Numbers of labels and the like [bytes].
SMALL = 1024


def recipe(*changes: str) -> Config:
    """The cluster recipe, changed."""
    return load(RECIPE, [*_OVERLAP, *changes])


def _grid(config: Config) -> list[dict[str, int]]:
    """Coordinates of every rank in the order tp-cp-dp-pp that mmscale.plan.timing takes distances from.

    `ep` is the rank among expert-parallel ranks, which are consecutive holders of the same dense weights: context- and
    then data-parallel ranks; `edp` numbers the copies of the same experts.
    """
    tp, ep, cp = config.parallel.tp, config.parallel.ep, config.parallel.cp
    holders = dense_replicas(config, WORLD)
    grid = []
    for rank in range(WORLD):
        holder = rank // tp % holders
        sizes = {"cp": holder % cp, "dp": holder // cp, "ep": holder % ep, "edp": holder // ep}
        grid.append({"rank": rank, "tp": rank % tp, "pp": rank // (tp * holders)} | sizes)
    return grid


def alone(function: Any) -> None:
    """In a process of its own, as what a rank of a fake world starts is global."""

    def run(ranks: RankEnv) -> None:
        del ranks
        function()

    run_ranks(run, world_size=1, timeout_s=300)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.ep=4"],
        ["parallel.tp=2", "parallel.pp=4", "parallel.ep=4"],
        ["parallel.tp=8", "parallel.pp=2", "parallel.ep=2"],
        ["parallel.tp=2", "parallel.pp=2", "parallel.ep=8", "parallel.cp=4", "data.document_multiple=8"],
    ],
)
def test_ranks_stand_in_the_order_that_times_are_planned_with(layout: list[str]) -> None:
    config = recipe(*layout)
    grid = _grid(config)
    # Ranks that agree in these coordinates form a group.
    fixed = {
        "tp": ("dp", "cp", "pp"),
        "pp": ("dp", "cp", "tp"),
        "dp": ("cp", "tp", "pp"),
        "cp": ("dp", "tp", "pp"),
        "dp_cp": ("tp", "pp"),
        "ep": ("tp", "pp", "edp"),
        "expt_dp": ("tp", "pp", "ep"),
    }

    def check() -> None:
        for rank in (0, 1, 21, 42, 63):
            with rank_of(config, rank, WORLD) as pg:
                for name, coordinates in fixed.items():
                    members = [
                        other["rank"] for other in grid if all(other[key] == grid[rank][key] for key in coordinates)
                    ]
                    found = torch.distributed.get_process_group_ranks(getattr(pg, name))
                    assert found == members, f"rank {rank}: {name}"

    alone(check)


def test_a_rank_of_the_recipe_holds_what_the_plan_says() -> None:
    """The whole model: 24 layers at full width, 7.1 billion parameters over 64 ranks."""
    config = recipe()
    (planned,) = stages_memory(config, WORLD)

    def check() -> None:
        with rank_of(config, 37, WORLD) as pg:
            states = states_of(config, pg)
        assert states.parameters == planned.parameters
        assert states.gradients == pytest.approx(planned.gradients, rel=PADDING)
        assert states.optimizer == pytest.approx(planned.optimizer, rel=PADDING)

    alone(check)


# Every kind of parallelism and every kind of layer is in those that remain.
RARE = ("recipe", "tp8_depth", "cp2_pp4_ep8")
# Two layers of a stage say what all do; two micro-batches, for what comes once a step and what comes with each.
STEPS: dict[str, list[str]] = {
    "recipe": ["model.num_layers=2"],
    "tp2_pp4_ep4": ["parallel.tp=2", "parallel.pp=4", "parallel.ep=4", "model.num_layers=4"],
    "tp8_depth": [
        *("parallel.tp=8", "parallel.ep=4", "parallel.recompute=none", "model.num_layers=2", "model.norm=pre"),
        *("model.depth.every=2", "model.depth.capacity=0.25"),
    ],
    "tp4_pp2_vpp2_shared": [
        *("parallel.tp=4", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2", "model.num_layers=4"),
        *("model.norm=post_per_expert", "model.experts.shared=1"),
    ],
    "cp4_tp2_depth": [
        *("parallel.cp=4", "data.document_multiple=8", "parallel.tp=2", "parallel.ep=4", "parallel.recompute=none"),
        *("model.num_layers=2", "model.norm=pre", "model.depth.every=2", "model.depth.capacity=0.25"),
    ],
    "cp2_pp4_ep8": [
        *("parallel.cp=2", "data.document_multiple=4", "parallel.pp=4", "parallel.ep=8", "model.num_layers=4"),
    ],
}


@pytest.mark.parametrize(
    "name",
    [
        "tp4_pp2_vpp2_shared",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("tp2_pp4_ep4", "cp4_tp2_depth")),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in RARE),
    ],
)
def test_a_step_holds_and_says_what_the_plan_says(name: str) -> None:
    small = ["train.micro_batch_size=2", "model.seq_length=1024"]
    config = recipe(*small, *STEPS[name])
    replicas = dense_replicas(config, WORLD)
    sequences = 2 * 2 * data_parallel_size(config, WORLD)
    config = recipe(*small, *STEPS[name], f"train.global_batch_size={sequences}")
    planned_memory = stages_memory(config, WORLD)

    def check() -> None:
        for stage in sorted({0, config.parallel.pp // 2, config.parallel.pp - 1}):  # first, one between, last
            rank = (stage * replicas + 5 % replicas) * config.parallel.tp
            with rank_of(config, rank, WORLD) as pg:
                states, messages = one_step(config, pg)
            planned = planned_memory[stage]
            assert states.parameters == planned.parameters
            assert states.gradients == pytest.approx(planned.gradients, rel=PADDING)
            assert states.optimizer == pytest.approx(planned.optimizer, rel=PADDING)
            _assert_says(messages, config, stage)

    alone(check)


def _assert_says(messages: Collectives, config: Config, stage: int) -> None:
    planned: Counter[tuple[str, int]] = Counter()
    for traffic in communication(config, WORLD, stage=stage):
        ranks = 2 if traffic.operation is Operation.SEND else traffic.ranks
        planned[traffic.operation.value, ranks] += traffic.payload  # type: ignore[assignment]
    said = messages.payload
    different = {
        key: (said.get(key, 0), planned.get(key, 0))
        for key in said.keys() | planned.keys()
        if abs(said.get(key, 0) - planned.get(key, 0)) > max(SMALL, PADDING * planned.get(key, 0))
    }
    assert not different, f"stage {stage}: (said, planned) bytes of {different}"
    exchanges = (Operation.ALL_TO_ALL.value, config.parallel.ep)
    calls = sum(
        traffic.calls
        for traffic in communication(config, WORLD, stage=stage)
        if traffic.operation is Operation.ALL_TO_ALL
    )
    assert messages.calls[exchanges] == calls
