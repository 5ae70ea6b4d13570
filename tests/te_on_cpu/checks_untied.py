"""Weights for each modality over Transformer-Engine's grouped products: against the torch backend, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.model.build import build_chunks
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import compare, compare_tensors, verdict
from tests.distributed.layouts import References, assert_passes, config, start, trace
from tests.distributed.test_resume import TOLERANCE, leg, settings
from tests.support import run_ranks
from tests.te_on_cpu.checks_layouts import references  # noqa: F401  a fixture
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.over_te import can_run, small, using  # noqa: F401  a fixture

PADDED = {"document_multiple": 8}
GROUPED = "te_general_grouped_gemm"
# Models with their layouts of two ranks. mot_post_depth also has layers whose tokens only the device knows.
LAYOUTS: dict[str, tuple[dict[str, Any], ...]] = {
    "mot": ({}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2, "recompute": "full"}),
    "mot_post_depth": ({"tp": 2}, {"cp": 2}),
    "moma_untied": ({"ep": 2}, {"tp": 2}),
}


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_layout_is_one_process_of_the_torch_backend(model: str, references: References, tmp_path: Path) -> None:  # noqa: F811
    """Loss, gradient norm and every tensor after a step, in fp32; a micro-batch may lack a modality."""
    for parallel in LAYOUTS[model]:
        data = PADDED if "cp" in parallel else {}
        for absent in (None, "image"):
            references.get(using(config(model, data=data), "torch"), absent=absent)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, parallel in enumerate(LAYOUTS[model]):
            made = config(model, parallel=parallel, data=PADDED if "cp" in parallel else {})
            plain = using(made, "torch")
            for absent in (None, "image") if number < 2 else (None,):
                reference = references.get(plain, absent=absent)
                saved, own = references.checkpoint(plain, absent=absent), tmp_path / f"{number}_{absent}"
                CALLS.clear()
                found = trace(using(made, "te"), ranks, saved=own, reference=saved, absent=absent)
                assert CALLS[GROUPED] > 0, (parallel, CALLS)
                tensors = process_groups.from_first(compare_tensors(saved, own) if ranks.rank == 0 else None)
                assert_passes(verdict(made, reference=reference, trace=found, tensors=tensors), f"{parallel} {absent}")

    run_ranks(ranks_do, world_size=2, timeout_s=600)


@pytest.mark.parametrize("model", ["mot", "moma_untied"])
def test_bf16_is_near_the_torch_backend(model: str) -> None:
    """With fused attention over documents, which has another rounding."""

    def one(ranks: RankEnv) -> None:
        start(ranks)
        made = small(config(model, dtype="bf16"), num_layers=2)
        loss, norm = compare(trace(using(made, "torch"), ranks), trace(using(made, "te"), ranks))
        assert loss < 0.01 and norm < 0.03, (loss, norm)

    run_ranks(one, world_size=1)


def test_slots_hold_the_classes_of_the_backend() -> None:
    from mmscale.model.linear_te import ColumnLinear, Norm, NormColumnLinear, RowLinear
    from mmscale.model.untied import UntiedRMSNorm
    from mmscale.model.untied_te import GroupedColumnLinear, GroupedRowLinear

    parts = ("attention", "ffn", "norms")

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        for untie in (("attention",), ("ffn",), ("norms",), ("attention", "norms"), parts):
            made = using(small(config("dense", dtype="bf16"), num_layers=1, untie=untie), "te")
            layer = build_chunks(made, groups)[0].decoder.layers[0]
            norm = UntiedRMSNorm if "norms" in untie else Norm
            for part, linears, before in (
                (
                    "attention",
                    (layer.self_attention.linear_qkv, layer.self_attention.linear_proj),
                    layer.input_layernorm,
                ),
                ("ffn", (layer.mlp.linear_fc1, layer.mlp.linear_fc2), layer.pre_mlp_layernorm),
            ):
                first, second = map(type, linears)
                if part in untie:
                    assert (first, second, type(before)) == (GroupedColumnLinear, GroupedRowLinear, norm), untie
                    names = [name for name, _ in linears[0].named_parameters()]
                    assert names == ["text", "image"], names
                elif "norms" in untie:
                    assert (first, second, type(before)) == (ColumnLinear, RowLinear, UntiedRMSNorm), untie
                else:
                    assert (first, second) == (NormColumnLinear, RowLinear), untie

    run_ranks(one, world_size=1)


def test_a_run_may_change_its_backend_and_its_layout(tmp_path: Path) -> None:
    """To Transformer-Engine and back: the numbers of the run that changed nothing. A stopped run goes on exactly."""
    chain: Any = (("torch", {}, 2), ("te", {"tp": 2}, 3), ("torch", {"pp": 2}, 4))

    def ranks_of_two(ranks: RankEnv) -> None:
        start(ranks)
        same, changed = tmp_path / "same", tmp_path / "changed"
        reference = leg(using(settings("mot", parallel={}), "torch"), same, load=None, until=4)
        at, losses, norms = None, (), ()
        for backend, parallel, until in chain:
            found = leg(using(settings("mot", parallel=parallel), backend), changed, load=at, until=until)
            at, losses, norms = until, losses + found.losses, norms + found.norms
        assert losses == pytest.approx(reference.losses, rel=TOLERANCE)
        assert norms == pytest.approx(reference.norms, rel=10 * TOLERANCE)
        made = using(settings("mot", parallel={"tp": 2}, dtype="bf16"), "te")
        whole = leg(made, tmp_path / "whole", load=None, until=3)
        halves = leg(made, tmp_path / "half", load=None, until=2) + leg(made, tmp_path / "half", load=2, until=3)
        assert whole == halves

    run_ranks(ranks_of_two, world_size=2, timeout_s=600)


def test_gradients_where_a_modality_has_no_tokens_or_is_frozen() -> None:
    """Zeros, not None, so that all ranks reduce the same gradients. A frozen weight does not freeze the others."""
    from mmscale.model.untied import Rows
    from mmscale.model.untied_te import GroupedColumnLinear

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        made = using(small(config("mot"), num_layers=1), "te")
        linear = build_chunks(made, groups)[0].decoder.layers[0].mlp.linear_fc1
        assert type(linear) is GroupedColumnLinear
        order = torch.arange(6)
        tokens = torch.randn(6, linear.text.shape[1], requires_grad=True)
        CALLS.clear()
        linear._multiply(tokens, Rows(order, order, torch.tensor([6, 6], dtype=torch.int32), [6, 0])).sum().backward()
        assert CALLS[GROUPED] == 3  # forward, gradients of tokens and of weights
        assert torch.equal(linear.image.grad, torch.zeros_like(linear.image))
        assert torch.allclose(linear.text.grad, tokens.detach().sum(0).expand_as(linear.text))

        linear.text.requires_grad_(False)
        linear.text.grad = linear.image.grad = None
        linear._multiply(tokens, Rows(order, order, torch.tensor([2, 6], dtype=torch.int32), [2, 4])).sum().backward()
        assert linear.text.grad is None
        assert torch.allclose(linear.image.grad, tokens.detach()[2:].sum(0).expand_as(linear.image))

    run_ranks(one, world_size=1)
