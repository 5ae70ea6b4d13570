"""Every parallel layout equals one process: loss and gradient norm over several steps, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.verify import Trace, compare
from tests.distributed.layouts import NORM_TOLERANCE, References, assert_equal, config, trace
from tests.support import run_ranks

TWO_RANKS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "pp2_interleaved": {"pp": 2, "vpp": 2},
    "tp2_recompute": {"tp": 2, "recompute": "full"},
    "pp2_recompute": {"pp": 2, "recompute": "full"},
    "ep2_recompute_selective": {"ep": 2, "recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "pp2_ep2": {"pp": 2, "ep": 2},
    "dp2_ep2": {"ep": 2},
    "pp2_interleaved_ep2_overlap": {"pp": 2, "vpp": 2, "ep": 2, "overlap_grad_reduce": True},
    "tp2_ep2_recompute": {"tp": 2, "ep": 2, "recompute": "full"},
}


def _run(
    references: References, model: str, world_size: int, layouts: dict[str, dict[str, Any]], **options: Any
) -> None:
    """All layouts one after another in one set of forked ranks."""
    reference = references.get(config(model), **options)

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for name, parallel in layouts.items():
            assert_equal(reference, trace(config(model, parallel=parallel), ranks, **options), f"{model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=world_size, timeout_s=240)


def _fits(model: str, layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A dense model has no experts to spread."""
    return {name: p for name, p in layouts.items() if model != "dense" or p.get("ep", 1) == 1}


@pytest.mark.parametrize(
    "model",
    [
        "dense",
        "moe",
        "moma",
        "moma_post",
        "moma_depth",
        "moma_post_per_expert_shared",
        "moma_competitive",
        "moe_softmax",
    ],
)
def test_two_ranks_equal_one_process(references: References, model: str) -> None:
    _run(references, model, 2, _fits(model, TWO_RANKS))


@pytest.mark.parametrize(
    "model",
    [
        *("moma", "moma_depth", "moma_depth_per_modality"),
        pytest.param("moma_competitive", marks=pytest.mark.exhaustive),
    ],
)
def test_four_ranks_equal_one_process(references: References, model: str) -> None:
    _run(references, model, 4, FOUR_RANKS)


@pytest.mark.parametrize("absent", ["image", "text"])
def test_a_modality_may_be_missing_in_a_micro_batch(references: References, absent: str) -> None:
    """Odd micro-batches lack a modality: its experts run on masked slots and every rank stays in the exchange."""
    layouts = {name: TWO_RANKS[name] for name in ("tp2", "pp2", "ep2", "dp2_overlap", "pp2_recompute")}
    _run(references, "moma", 2, layouts, absent=absent)


def test_a_text_only_rank_neither_hangs_nor_loses_gradients(references: References) -> None:
    """With two micro-batches a step, the rank with odd numbers never sees an image, under EP2 and PP2 x EP2."""
    batches = {"micro_batch_size": 4}
    reference = references.get(config("moma_depth", **batches), absent="image")

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        found = trace(config("moma_depth", parallel={"ep": 2}, **batches), ranks, absent="image")
        assert_equal(reference, found, "ep2, text-only rank")
        groups.finalize()

    run_ranks(steps, world_size=2)


def test_bf16_layouts_follow_one_process(references: References) -> None:
    """bf16 with fp32 main parameters: DP, EP and PP round as one process does; TP rounds partial sums to 8 bits."""
    reference = references.get(config("moma_depth", dtype="bf16"))
    # Over seeds 1234, 7, 8 and 9 EP2 ends 0.5 to 1.6e-4 away: gradients of 8 bits are summed in another order.
    bounds = {"dp2": 1e-5, "ep2": 5e-4, "pp2": 1e-5, "tp2": 5e-3}

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for name, bound in bounds.items():
            found = trace(config("moma_depth", dtype="bf16", parallel=TWO_RANKS[name]), ranks)
            loss, _ = compare(reference, found)
            assert loss <= bound, f"{name}: loss differs by {loss:.2e}"
        groups.finalize()

    run_ranks(steps, world_size=2)


def _unmark(names: tuple[str, ...], attribute: str, value: Any) -> Any:
    """Take a gradient attribute away from all parameters whose name holds one of these words."""

    def alter(chunks: list[torch.nn.Module]) -> None:
        found = 0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if any(word in name for word in names):
                    setattr(parameter, attribute, value)
                    found += 1
        assert found, f"no parameter is called like {names}"

    return alter


def _forget_qk_norms(chunks: list[torch.nn.Module]) -> None:
    """finalize_model_grads also finds them by name while config.qk_layernorm is set."""
    _unmark(("q_layernorm", "k_layernorm"), "sequence_parallel", False)(chunks)
    for chunk in chunks:
        chunk.config.qk_layernorm = False


NEGATIVE_CONTROLS = {
    "norm weights are partial over tensor ranks": ({"tp": 2}, _unmark(("layernorm",), "sequence_parallel", False)),
    "q and k norms are partial over tensor ranks": ({"tp": 2}, _forget_qk_norms),
    "expert routers are partial over tensor ranks": ({"tp": 2}, _unmark((".router.",), "sequence_parallel", False)),
    "depth routers are partial over tensor ranks": ({"tp": 2}, _unmark(("depth_router",), "sequence_parallel", False)),
    "experts are sharded over tensor ranks": ({"tp": 2}, _unmark((".experts.",), "tensor_model_parallel", False)),
    "experts reduce over their own group": ({"ep": 2}, _unmark((".experts.",), "allreduce", True)),
}


def test_without_a_gradient_attribute_the_matrix_would_fail(references: References) -> None:
    """Each attribute taken away alone makes loss or gradient norm leave the tolerance by far."""
    reference = references.get(config("moma_depth"))

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for why, (parallel, alter) in NEGATIVE_CONTROLS.items():
            found = trace(config("moma_depth", parallel=parallel), ranks, alter=alter)
            loss, norm = compare(reference, found)
            assert max(loss, norm) > 5 * NORM_TOLERANCE, f"no test would see that {why}: {loss:.1e}, {norm:.1e}"
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=240)


def test_initial_weights_do_not_depend_on_the_layout(references: References) -> None:
    """The matrix compares first steps too; here: another seed gives other weights."""
    first: Trace = references.get(config("moma"))
    other = config("moma").model_copy(update={"run": config("moma").run.model_copy(update={"seed": 7})})
    assert references.get(other).losses[0] != first.losses[0]
