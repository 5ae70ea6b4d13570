"""Transformer-Engine's context parallelism (`parallel.cp_attention: ring`): its own Python, plain torch for kernels."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_engine_torch as tex
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.config import Config
from mmscale.data.stream.context_rows import zigzag
from mmscale.errors import ConfigError, DataError
from mmscale.model.attention import DocumentAttention
from mmscale.model.attention_te import FusedDocumentAttention, RingDocumentAttention
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.context import ContextSplit
from mmscale.model.ragged import begins_of, ends_of
from mmscale.plan.communication import MessageKind, Operation, communication
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import compare, with_share
from tests.distributed.layouts import config, start, trace
from tests.distributed.test_resume import leg, tensors
from tests.support import run_ranks
from tests.te_on_cpu.checks_context import DOCUMENTS, LENGTH, PADDED, _params
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.enumerations import MACHINE
from tests.te_on_cpu.over_te import can_run, using  # noqa: F401  a fixture

RING: dict[str, Any] = {"cp": 2, "cp_attention": "ring"}


@pytest.mark.parametrize("size", [2, 4])
def test_the_split_is_transformer_engines_partition(size: int) -> None:
    """Also of several sequences, one after another, and if empty documents follow the last one."""
    documents = torch.from_numpy(DOCUMENTS)
    order = torch.from_numpy(zigzag(DOCUMENTS, size=size))
    ends = ends_of(begins_of(documents), 9)
    for rank in range(size):
        own = order.view(len(order), size, -1)[:, rank]
        rows = own + torch.arange(len(order)).unsqueeze(1) * LENGTH
        found = tex.thd_get_partitioned_indices(ends, documents.numel(), size, rank)
        assert torch.equal(found.long(), rows.reshape(-1))


def _attention(kind: type, made: Config, groups: Any) -> Any:
    return kind(
        transformer_config(made),
        1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        pg_collection=groups,
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_a_ring_attends_as_whole_documents(size: int, key_value_heads: int) -> None:
    """Outputs and gradients of every rank's tokens; documents longer and shorter than a rank's part."""
    documents = torch.from_numpy(DOCUMENTS)
    batch = len(documents)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=size)
        made = config("moma", dtype="bf16", parallel={"cp": size, "cp_attention": "ring"}, data=PADDED)
        made = made.model_copy(update={"model": made.model.model_copy(update={"num_query_groups": key_value_heads})})
        ring = _attention(RingDocumentAttention, made, groups)
        alone = DocumentAttention(transformer_config(made), 1, pg_collection=groups)
        generator = torch.Generator().manual_seed(5)
        shapes = (4, key_value_heads, key_value_heads)
        q, k, v = (torch.randn(LENGTH, batch, heads, 16, generator=generator).bfloat16() for heads in shapes)
        gradient = torch.randn(LENGTH, batch, 64, generator=generator).bfloat16()
        order = torch.from_numpy(zigzag(DOCUMENTS, size=size)).t().contiguous()
        for bound in (None, 6):
            params = _params(order, ranks.rank, size, documents, bound=bound)
            exact = [tensor.float().requires_grad_() for tensor in (q, k, v)]
            expected = alone(*exact, packed_seq_params=_params(order, 0, 1, documents, bound=None))
            wanted = torch.autograd.grad(expected, exact, gradient.float())
            mine = [params.local(tensor).requires_grad_() for tensor in (q, k, v)]
            CALLS.clear()
            out = ring(*mine, packed_seq_params=params)
            found = torch.autograd.grad(out, mine, params.local(gradient))
            assert CALLS["fused_attn_fwd"] == CALLS["fused_attn_bwd"] == size
            for one, other in zip((out, *found), (expected, *wanted), strict=True):
                _assert_near(one, params.local(other).detach())
        process_groups.finalize()

    run_ranks(ranks_do, world_size=size)


def _assert_near(found: Tensor, exact: Tensor) -> None:
    """Within rounding to bf16 of the largest elements: a step's result is rounded, and so is every sum."""
    difference = (found.float() - exact).abs().max() / exact.abs().max()
    assert difference < 2**-7, float(difference)


# Ranks: name: model and layout.
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "cp2": ("dense", {}),
        "cp2 ep2, recomputed": ("moma_7t1i", {"ep": 2, "recompute": "full"}),
        "cp2, attention recomputed": ("dense", {"recompute": "selective", "recompute_modules": ["core_attn"]}),
    },
    4: {
        "cp4": ("dense", {"cp": 4}),
        "cp2 tp2": ("moma_7t1i", {"tp": 2}),
        "cp2 pp2": ("dense", {"pp": 2}),
        "cp2 dp2 ep4": ("moma_7t1i", {"ep": 4}),
    },
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_steps_are_near_one_process(world_size: int, tmp_path: Path) -> None:
    def alone(ranks: RankEnv) -> None:
        start(ranks)
        for model in sorted({model for model, _ in LAYOUTS[world_size].values()}):
            torch.save(trace(using(config(model, dtype="bf16", data=PADDED), "te"), ranks), tmp_path / model)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for name, (model, parallel) in LAYOUTS[world_size].items():
            reference = torch.load(tmp_path / model, weights_only=False)
            made = using(config(model, dtype="bf16", data=PADDED, parallel=RING | parallel), "te")
            CALLS.clear()
            loss, norm = compare(reference, trace(made, ranks))
            assert CALLS["thd_out_correction"] and CALLS["thd_grad_correction"], (model, name)
            assert loss <= 2e-3 and norm <= 2e-2, (model, name, loss, norm)
            print(f"{name}: loss {loss:.1e}, norm {norm:.1e}", flush=True)

    run_ranks(alone, world_size=1)
    run_ranks(ranks_do, world_size=world_size, timeout_s=1200)


@pytest.mark.parametrize("model", ["dense", "moma_7t1i"])
def test_a_run_goes_on_in_other_layouts(model: str, tmp_path: Path) -> None:
    """A ring of two, one process, gathered keys of four, a ring of four: as near to one process as layouts are."""
    chain: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, RING),
        (1, {}),
        (4, {"cp": 4, "cp_attention": "gather"}),
        (4, {"cp": 4, "cp_attention": "ring"}),
    )
    whole = tmp_path / "whole"

    def made(parallel: dict[str, Any]) -> Config:
        found = with_share(using(config(model, dtype="bf16", data=PADDED, parallel=parallel), "te"))
        optim = found.optim.model_copy(update={"schedule": "cosine", "warmup": 2, "weight_decay": 0.1})
        return found.model_copy(update={"optim": optim})

    for at, (world_size, parallel) in enumerate(chain):

        def ranks_do(ranks: RankEnv, at: int = at, parallel: dict[str, Any] = parallel) -> None:
            start(ranks)
            CALLS.clear()
            found = leg(made(parallel), tmp_path / "changed", load=at or None, until=at + 1)
            assert bool(CALLS["thd_out_correction"]) == (parallel.get("cp_attention") == "ring")
            if ranks.rank == 0:
                torch.save(found, tmp_path / f"leg_{at}")
            process_groups.finalize()

        run_ranks(ranks_do, world_size=world_size, timeout_s=600)

    def alone(ranks: RankEnv) -> None:
        start(ranks)
        reference = leg(made({}), whole, load=None, until=len(chain))
        legs = [torch.load(tmp_path / f"leg_{at}", weights_only=False) for at in range(len(chain))]
        losses, norms = (sum((getattr(one, what) for one in legs), ()) for what in ("losses", "norms"))
        assert losses == pytest.approx(reference.losses, rel=2e-3), (losses, reference.losses)
        assert norms == pytest.approx(reference.norms, rel=2e-2), (norms, reference.norms)
        last = len(chain)
        wrote, expected = tensors(tmp_path / "changed", last), tensors(whole, last)
        assert {k: v.shape for k, v in wrote.items()} == {k: v.shape for k, v in expected.items()}

    run_ranks(alone, world_size=1, timeout_s=600)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(recipe: str) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = using(config("moma", dtype="bf16", data=PADDED, parallel=RING), "te", fp8=recipe)
        loss, norm = compare(trace(using(made, "te", fp8="off"), ranks), trace(made, ranks))
        assert 0.0 < loss < 0.02 and norm < 0.05, (recipe, loss, norm)

    run_ranks(ranks_do, world_size=2, timeout_s=400)


@pytest.mark.parametrize("size", [2, 4])
def test_the_plan_counts_what_a_ring_sends(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if attention is recomputed, which sends keys and values again."""
    ring: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
    communicate, sent = ring.flash_attn_p2p_communicate, []

    def counted(rank: int, tensor: Tensor, *rest: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return communicate(rank, tensor, *rest)

    monkeypatch.setattr(ring, "flash_attn_p2p_communicate", counted)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for recompute in ("none", "selective"):
            parallel = {"cp": size, "cp_attention": "ring", "recompute": recompute}
            made = using(config("dense", dtype="bf16", data=PADDED, parallel=parallel), "te")
            sent.clear()
            trace(made, ranks, steps=1)
            planned = [
                entry
                for entry in communication(made, size)
                if (entry.kind, entry.operation) == (MessageKind.CP, Operation.SEND)
            ]
            assert len(sent) == sum(entry.calls for entry in planned)
            assert sum(sent) == sum(entry.sent for entry in planned)

    run_ranks(ranks_do, world_size=size)


def test_layers_take_the_ring_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=2)
        for chosen, wanted in (("ring", RingDocumentAttention), ("gather", FusedDocumentAttention)):
            parallel = {"cp": 2, "cp_attention": chosen}
            made = using(config("moma", dtype="bf16", parallel=parallel, data=PADDED), "te")
            layer = build_chunks(made, groups)[0].decoder.layers[0]
            assert type(layer.self_attention.core_attention) is wanted
        made = using(config("moma", dtype="bf16", parallel=RING, data=PADDED), "te")
        monkeypatch.setattr(MACHINE, "capability", (8, 0))  # cuDNN takes no ragged sequences there
        with pytest.raises(ConfigError, match="no fused attention for packed documents") as caught:
            build_chunks(made, groups)
        assert caught.value.remedy == "use parallel.cp_attention=gather"

    run_ranks(two, world_size=2)


def test_more_documents_than_kernels_take_are_refused() -> None:
    def two(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=2)
        ring = _attention(RingDocumentAttention, config("moma", dtype="bf16", parallel=RING, data=PADDED), groups)
        documents = np.repeat(np.arange(12_288, dtype=np.int32), 4)[None]
        order = torch.from_numpy(zigzag(documents, size=2)).t()
        params = _params(order, ranks.rank, 2, torch.from_numpy(documents), bound=documents.shape[1] // 4)
        nothing = torch.empty(0, 1, 4, 16)
        with pytest.raises(DataError, match="room for 12,288 documents in a micro-batch") as caught:
            ring(nothing, nothing, nothing, packed_seq_params=params)
        assert "cp_attention=gather" in str(caught.value.remedy)

    run_ranks(two, world_size=2)


def test_a_wrong_order_of_rows_is_seen() -> None:
    """Negative control: the late piece before the early one."""

    def two(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=2)
        ring = _attention(RingDocumentAttention, config("moma", dtype="bf16", parallel=RING, data=PADDED), groups)
        documents = torch.zeros(1, LENGTH, dtype=torch.int32)
        right = torch.from_numpy(zigzag(documents.numpy(), size=2)).t()
        wrong = right.view(2, 2, -1).flip(1).reshape(-1, 1)
        q, k, v = (torch.randn(LENGTH, 1, h, 16, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
        outputs = []
        for order in (right, wrong):
            params = _params(order, ranks.rank, 2, documents, bound=None)
            mine = [params.local(tensor).bfloat16() for tensor in (q, k, v)]
            whole = ContextSplit(order, ranks.rank, 2).gather(ring(*mine, packed_seq_params=params), groups.cp)
            outputs.append(whole.float())
        exact = DocumentAttention(transformer_config(config("moma")), 1, pg_collection=groups)(q, k, v)
        assert (outputs[0] - exact).abs().max() < 0.05 < 0.5 < (outputs[1] - exact).abs().max()

    run_ranks(two, world_size=2)


def test_documents_that_a_ring_cannot_cut_are_refused_by_the_loader() -> None:
    with pytest.raises(DataError, match=r"no multiple of 2 \* 2"):
        zigzag(np.repeat(np.array([[0, 1]], np.int32), (6, 58), axis=1), size=2)
