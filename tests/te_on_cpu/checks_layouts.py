"""Uneven layouts over Transformer-Engine's Python: against one process of the torch backend, tensor by tensor.

Groups of experts that expert parallelism does not divide, pipeline stages of unequal numbers of layers, and key/value
heads that tensor-parallel ranks share; in fp32, and under FP8, whose delayed scales are those of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config.rules import violations
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import assembly
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import compare, compare_tensors, verdict
from mmscale.train.state.train_state import unwrapped
from mmscale.train.steps.batch import to_device
from tests.distributed.layouts import References, assert_passes, config, start, trace
from tests.support import run_ranks
from tests.te_on_cpu.over_te import can_run, in_whole_blocks, small, using  # noqa: F401  a fixture

# Name: number of ranks, model, layout. checks_matrix.py has those that do not run for every change, and FP8 under all.
EVERY_CHANGE: dict[str, tuple[int, str, dict[str, Any]]] = {
    "7t1i ep2": (2, "moma_7t1i", {"ep": 2}),
    "chunks of 1, 2, 1 and 1 layers": (2, "moma_five_layers", {"pp": 2, "vpp": 2, "pp_layers": (1, 2, 1, 1)}),
    "one key/value head, tp2": (2, "moma_one_kv_head", {"tp": 2}),
}
UNEVEN: dict[str, tuple[int, str, dict[str, Any]]] = EVERY_CHANGE | {
    "7t1i ep2, overlapped": (2, "moma_7t1i", {"ep": 2, "overlap_experts": True}),
    "stages of 2 and 3 layers": (2, "moma_five_layers", {"pp": 2, "pp_layers": (2, 3)}),
    "one key/value head, tp2, recomputed": (2, "moma_one_kv_head", {"tp": 2, "recompute": "full"}),
    "7t1i ep4": (4, "moma_7t1i", {"ep": 4}),
    "7t1i tp2 ep2": (4, "moma_7t1i", {"tp": 2, "ep": 2}),
    "7t1i ep2 of four": (4, "moma_7t1i", {"ep": 2}),
    "stages of 4 layers and 1, ep2": (4, "moma_five_layers", {"pp": 2, "ep": 2, "pp_layers": (4, 1)}),
    "one key/value head, tp4": (4, "moma_one_kv_head", {"tp": 4}),
}


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Traces of one process of the torch backend."""
    return References(tmp_path_factory.mktemp("references"))


def assert_one_process(references: References, names: Iterable[str], folder: Path, *, world_size: int) -> None:
    """Layouts over Transformer-Engine in fp32: losses, gradient norms and every tensor are those of one process."""
    for model in {UNEVEN[name][1] for name in names}:
        references.get(using(config(model), "torch"))

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, name in enumerate(names):
            _, model, parallel = UNEVEN[name]
            made = config(model, parallel=parallel)
            plain = using(made, "torch")
            reference, saved, own = references.get(plain), references.checkpoint(plain), folder / f"{number}"
            found = trace(using(made, "te"), ranks, saved=own, reference=saved)
            tensors = process_groups.from_first(compare_tensors(saved, own) if ranks.rank == 0 else None)
            assert_passes(verdict(made, reference=reference, trace=found, tensors=tensors), name)

    run_ranks(ranks_do, world_size=world_size, timeout_s=400)


def assert_fp8_near_bf16(names: Iterable[str], recipe: str, *, world_size: int) -> None:
    """Losses under a recipe are others than those of bf16, and near them."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for name in names:
            _, model, parallel = UNEVEN[name]
            made = config(model, dtype="bf16", parallel=parallel)
            if violations(using(made, "te", fp8=recipe), world_size=world_size):
                made = in_whole_blocks(made)
            assert violations(using(made, "te", fp8=recipe), world_size=world_size) == [], name
            loss, norm = compare(trace(using(made, "te"), ranks), trace(using(made, "te", fp8=recipe), ranks))
            assert 0.0 < loss < 0.02 and norm < 0.05, (name, recipe, loss, norm)

    run_ranks(ranks_do, world_size=world_size, timeout_s=600)


def test_fp32_is_one_process_of_the_torch_backend(references: References, tmp_path: Path) -> None:
    assert_one_process(references, EVERY_CHANGE, tmp_path, world_size=2)


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {"ep": 2}), (4, {"tp": 2, "ep": 2})], ids=str)
def test_delayed_scales_are_those_of_an_expert(world_size: int, parallel: dict[str, int]) -> None:
    """After a step the newest amax of a weight is its own: 7t1i has other experts, and other numbers, on each rank."""
    from mmscale.model.experts_te import TEExperts

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        layout = process_groups.initialize_layout(tp=parallel.get("tp", 1), ep=parallel["ep"])
        made = using(small(config("moma_7t1i", dtype="bf16", parallel=parallel), num_layers=1), "te", fp8="delayed")
        built = assembly.build(made, layout)
        linears = [
            linear
            for module in unwrapped(built.chunks[0]).modules()
            if isinstance(module, TEExperts)
            for linear in (module.linear_fc1, module.linear_fc2)
        ]
        largest = [torch.stack([weight.detach().abs().max() for weight in linear.parameters()]) for linear in linears]
        for amax in largest:
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=layout.tp)
        mixture = SyntheticMixture(made, share={"text": 0.7, "image": 0.3})
        batch = to_device(mixture.micro_batch(ranks.rank // layout.tp.size()), mixture.vocabulary)
        assert built.stepper.train([batch], lr=1e-3).applied
        for linear, amax in zip(linears, largest, strict=True):
            seen = linear.fp8_state()[1:, :, 1].amax(dim=0)  # amax of the weights; the history's other rows are empty
            assert torch.equal(seen, amax.float()), (linear.ub_name, seen, amax)
        process_groups.destroy_layout()

    run_ranks(ranks_do, world_size=world_size)


def test_another_layout_begins_without_the_scales_of_the_last() -> None:
    """Transformer-Engine would reduce those of the first layout's modules too, over groups that are gone."""

    def two(ranks: RankEnv) -> None:
        start(ranks)
        for model, parallel in (("moma_7t1i", {"ep": 2}), ("moma", {"pp": 2})):
            trace(using(small(config(model, dtype="bf16", parallel=parallel)), "te", fp8="delayed"), ranks, steps=1)

    run_ranks(two, world_size=2)
