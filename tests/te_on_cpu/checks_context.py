"""Context parallelism over Transformer-Engine's Python: pieces of documents in its attention, and whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.data.stream.context_rows import zigzag
from mmscale.model.attention import DocumentAttention
from mmscale.model.attention_te import FusedDocumentAttention
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.context import ContextSplit
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import compare, compare_tensors, verdict
from tests.distributed.layouts import References, assert_passes, config, start, trace
from tests.support import run_ranks
from tests.te_on_cpu.checks_layouts import references  # noqa: F401  a fixture
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.over_te import can_run, using  # noqa: F401  a fixture

PADDED = {"document_multiple": 8}
LENGTH = 64
DOCUMENTS = np.stack([np.repeat((0, 1, 2), (8, 40, 16)), np.repeat((0, 1), (56, 8)), np.zeros(LENGTH)]).astype(np.int32)


def _params(order: Tensor, rank: int, size: int, documents: Tensor, *, bound: int | None) -> MixedModalParams:
    zeros = torch.zeros_like(documents)
    return MixedModalParams.of(
        modality_ids=zeros,
        position_ids=zeros,
        document_ids=documents,
        documents=bound,
        context=None if size == 1 else ContextSplit(order, rank, size),
    )


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_attend_as_whole_documents(size: int) -> None:
    """Outputs and gradients of every rank's tokens, as the loader and as Mixture-of-Depths layers split sequences."""
    documents = torch.from_numpy(DOCUMENTS)
    batch = len(documents)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=size)
        made = config("moma", dtype="bf16", parallel={"cp": size}, data=PADDED)
        transformer = transformer_config(made)
        fused = FusedDocumentAttention(
            transformer, 1, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=groups
        )
        alone = DocumentAttention(transformer, 1, pg_collection=groups)
        generator = torch.Generator().manual_seed(5)
        q, k, v = (torch.randn(LENGTH, batch, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
        gradient = torch.randn(LENGTH, batch, 64, generator=generator).bfloat16()
        by_document = torch.from_numpy(zigzag(DOCUMENTS, size=size)).t().contiguous()
        whole = ContextSplit(torch.arange(LENGTH).unsqueeze(1).expand(-1, batch), ranks.rank, size)
        for order in (by_document, whole.dealt(LENGTH).order):
            for bound in (None, 6):
                params = _params(order, ranks.rank, size, documents, bound=bound)
                plain = _params(order, 0, 1, documents, bound=None)
                leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
                expected = alone(*leaves, packed_seq_params=plain)
                wanted = torch.autograd.grad(expected, leaves, gradient)
                mine = [params.local(tensor).requires_grad_() for tensor in (q, k, v)]
                CALLS.clear()
                out = fused(*mine, packed_seq_params=params)
                found = torch.autograd.grad(out, mine, params.local(gradient))
                assert CALLS["fused_attn_fwd"] == CALLS["fused_attn_bwd"] == 1
                torch.testing.assert_close(out, params.local(expected), rtol=0.02, atol=0.02)
                for one, other in zip(found, wanted, strict=True):
                    torch.testing.assert_close(one, params.local(other), rtol=0.03, atol=0.03)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=size)


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"cp2": {"cp": 2}, "cp2 ep2, recomputed": {"cp": 2, "ep": 2, "recompute": "full"}},
    4: {"cp2 tp2": {"cp": 2, "tp": 2}, "cp2 pp2": {"cp": 2, "pp": 2}},
}


def test_split_sequences_are_one_process_of_the_torch_backend(references: References, tmp_path: Path) -> None:  # noqa: F811
    """fp32, so attention is the torch backend's; linears, norms and experts are Transformer-Engine's."""
    plain = using(config("moma_depth_joint", data=PADDED), "torch")
    reference, saved = references.get(plain), references.checkpoint(plain)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (name, parallel) in enumerate(LAYOUTS[2].items()):
            made = using(config("moma_depth_joint", data=PADDED, parallel=parallel), "te")
            own = tmp_path / str(number)
            found = trace(made, ranks, saved=own, reference=saved)
            tensors = process_groups.from_first(compare_tensors(saved, own) if ranks.rank == 0 else None)
            assert_passes(verdict(made, reference=reference, trace=found, tensors=tensors), name)

    run_ranks(ranks_do, world_size=2, timeout_s=400)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_bf16_with_fused_attention_is_near_one_process(world_size: int, tmp_path: Path) -> None:
    def alone(ranks: RankEnv) -> None:
        start(ranks)
        for model in ("moma_depth_joint", "dense"):
            torch.save(trace(using(config(model, dtype="bf16", data=PADDED), "te"), ranks), tmp_path / model)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for model in ("moma_depth_joint", "dense"):
            reference = torch.load(tmp_path / model, weights_only=False)
            for name, parallel in LAYOUTS[world_size].items():
                if model == "dense" and "ep" in parallel:
                    continue  # there are no experts to distribute
                made = using(config(model, dtype="bf16", data=PADDED, parallel=parallel), "te")
                CALLS.clear()
                loss, norm = compare(reference, trace(made, ranks))
                assert CALLS["fused_attn_fwd"] and loss <= 2e-3 and norm <= 2e-2, (model, name, loss, norm)

    run_ranks(alone, world_size=1)
    run_ranks(ranks_do, world_size=world_size, timeout_s=400)


def test_layers_take_fused_attention() -> None:
    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout(cp=2)
        for dtype, wanted in (("bf16", FusedDocumentAttention), ("fp32", DocumentAttention)):
            made = using(config("moma", dtype=dtype, parallel={"cp": 2}, data=PADDED), "te")
            layer = build_chunks(made, groups)[0].decoder.layers[0]
            assert type(layer.self_attention.core_attention) is wanted

    run_ranks(one, world_size=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(recipe: str) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for parallel in LAYOUTS[2].values():
            made = using(config("moma_depth", dtype="bf16", data=PADDED, parallel=parallel), "te", fp8=recipe)
            loss, norm = compare(trace(using(made, "te", fp8="off"), ranks), trace(made, ranks))
            assert 0.0 < loss < 0.02 and norm < 0.05, (recipe, parallel, loss, norm)

    run_ranks(ranks_do, world_size=2, timeout_s=400)
