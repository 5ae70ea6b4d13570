"""Replicas are equal under every layout; a rank with one flipped bit is named, or both where there are only two."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from mmscale.errors import TrainingError
from mmscale.resilience.divergence import blame, find_diverged
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import TrainingParts
from mmscale.train.hooks import ReplicaHook
from mmscale.train.throughput import Throughput
from tests.distributed.test_anomalies import build, changed, live, with_policy
from tests.distributed.test_resume import OVERLAPPED, settings, start
from tests.support import distributed


def flip_a_bit(parts: TrainingParts, name: str, *, rank: int) -> None:
    """The lowest bit of one element of one parameter, on one rank."""
    if torch.distributed.get_rank() != rank:
        return
    (parameter,) = (p for n, p in parts.chunks[0].named_parameters() if n.endswith(name))
    parameter.data.view(-1).view(torch.int32 if parameter.element_size() == 4 else torch.int16)[5] ^= 1


def trained(model: str, parallel: dict[str, Any], dtype: str = "fp32") -> TrainingParts:
    made = with_policy(settings(model, dtype=dtype, parallel=parallel), steps=2)
    parts, state = build(made)
    live(made, parts, state)
    return parts


HEALTHY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("moma_post_per_expert_shared", "bf16", {"tp": 2, "ep": 2}),
    ("moma_depth", "fp32", {"tp": 2, "pp": 2}),
    ("moma", "fp32", {"ep": 2, **OVERLAPPED}),
)


@distributed(world_size=4)
def test_healthy_replicas_are_equal_and_a_flipped_bit_is_found(ranks: RankEnv) -> None:
    start(ranks)
    host = socket.gethostname()
    for model, dtype, parallel in HEALTHY:
        parts = trained(model, parallel, dtype)
        with parts.stepper.materialized():
            assert find_diverged(parts.chunks, parts.groups) == [], (model, parallel)
        process_groups.destroy_layout()

    # Four replicas: the majority names the one.
    parts = trained("dense", {}, "bf16")
    flip_a_bit(parts, "layers.1.mlp.linear_fc1.weight", rank=2)
    (found,) = find_diverged(parts.chunks, parts.groups)
    assert (found.rank, found.host, found.certain) == (2, host, True)
    assert [name.endswith("layers.1.mlp.linear_fc1.weight") for name in found.parameters] == [True]
    process_groups.destroy_layout()

    # tp 2, dp 2: a norm has four copies, though no group has more than two ranks; a matrix has two of each half.
    parts = trained("dense", {"tp": 2})
    flip_a_bit(parts, "final_layernorm.weight", rank=1)
    (found,) = find_diverged(parts.chunks, parts.groups)
    assert (found.rank, found.certain) == (1, True)
    flip_a_bit(parts, "layers.0.mlp.linear_fc2.weight", rank=3)
    certain, *both = find_diverged(parts.chunks, parts.groups)
    assert certain == found
    assert [(one.rank, one.certain, len(one.parameters)) for one in both] == [(1, False, 1), (3, False, 1)]
    process_groups.destroy_layout()

    # What cannot be seen: gathering after the next step overwrites a rank's copy of what another one owns.
    made = with_policy(settings("dense"), steps=2)
    parts, state = build(made)
    live(made, parts, state)
    flip_a_bit(parts, "layers.0.self_attention.linear_qkv.weight", rank=2)
    assert [one.rank for one in find_diverged(parts.chunks, parts.groups)] == [2]
    live(changed(made, "train", steps=3), parts, state)
    assert find_diverged(parts.chunks, parts.groups) == []
    process_groups.destroy_layout()

    # Experts have replicas among ranks of the same expert-parallel place only: 0 and 2, 1 and 3.
    parts = trained("moma", {"ep": 2})
    flip_a_bit(parts, "layers.1.mlp.experts.text.w1", rank=1)
    assert [one.rank for one in find_diverged(parts.chunks, parts.groups)] == [1, 3]
    process_groups.destroy_layout()
    process_groups.finalize()


@distributed(world_size=2)
def test_sums_without_a_fixed_order_do_not_let_copies_drift(ranks: RankEnv) -> None:
    """On CUDA two ranks compute one gradient with other last bits. Here rank 1 adds some to every copy it holds."""
    start(ranks)
    made = with_policy(settings("moma_post_per_expert_shared", parallel={"tp": 2}), steps=3)
    parts, state = build(made)
    copies = [p for p in parts.chunks[0].parameters() if not getattr(p, "tensor_model_parallel", False)]
    assert len(copies) > 8
    for copy in copies if ranks.rank == 1 else ():
        copy.register_hook(lambda gradient: gradient * (1 + 1e-6))
    live(made, parts, state)
    assert find_diverged(parts.chunks, parts.groups) == []
    process_groups.finalize()


@distributed(world_size=3)
def test_the_hook_ends_the_attempt_at_its_step(ranks: RankEnv) -> None:
    """Every rank raises the same error, names the rank and tells one event; not before the step that compares."""
    start(ranks)
    made = changed(with_policy(settings("dense"), steps=2), "train", global_batch_size=6)
    parts, state = build(made)
    told: list[tuple[str, dict[str, Any]]] = []
    hook = ReplicaHook(
        changed(made, "resilience", parameter_hash_every=3),
        stepper=parts.stepper,
        groups=parts.groups,
        clock=Throughput(),
        on_event=lambda event, **fields: told.append((event, fields)),
    )
    flip_a_bit(parts, "final_layernorm.weight", rank=1)

    class Report:
        step = 2

    hook.on_step(state, Report())  # type: ignore[arg-type]
    assert told == []
    Report.step = 3
    with pytest.raises(TrainingError) as error:
        hook.on_step(state, Report())  # type: ignore[arg-type]
    assert f"rank 1 on {socket.gethostname()}" in error.value.cause and "final_layernorm.weight" in error.value.cause
    assert "without that node" in error.value.remedy and error.value.exit_status == 5
    ((event, fields),) = told
    assert event == "diverged_rank" and (fields["rank"], fields["certain"], fields["step"]) == (1, True, 3)
    process_groups.finalize()


def test_blame_by_majority() -> None:
    """Names by parameter; two against two, or one against one, leave it open; copies elsewhere do not count."""
    one, two = (0, 0, -1, -1, "one"), (0, 0, -1, -1, "two")
    hosts = ["a", "b", "c", "d"]
    found = blame(hosts, [{one: 1, two: 8}, {one: 1, two: 8}, {one: 2, two: 9}, {one: 1}])
    assert [(d.rank, d.host, d.parameters, d.certain) for d in found] == [(2, "c", ("one", "two"), True)]
    found = blame(hosts, [{one: 1}, {one: 1}, {one: 2}, {one: 2}])
    assert [(d.rank, d.certain) for d in found] == [(rank, False) for rank in range(4)]
    assert blame(hosts, [{one: 1}, {one: 1}, {}, {}]) == []
