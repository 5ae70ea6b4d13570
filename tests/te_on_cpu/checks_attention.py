"""Attention over Transformer-Engine's Python: documents, the choice of its backend, and machines without a kernel."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from packaging.version import Version

from mmscale.model.attention import DocumentAttention
from mmscale.model.attention_te import FusedDocumentAttention, takes_documents
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device
from tests.distributed.layouts import config
from tests.distributed.test_resume import start
from tests.support import run_ranks
from tests.te_on_cpu.compiled import CALLS
from tests.te_on_cpu.enumerations import MACHINE
from tests.te_on_cpu.over_te import can_run, using  # noqa: F401  a fixture

UTILS: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")


def test_fused_attention_stays_within_documents() -> None:
    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        transformer = transformer_config(config("moma", dtype="bf16"))  # 4 heads, 2 groups
        ours = DocumentAttention(transformer, 1)
        fused = FusedDocumentAttention(
            transformer, 1, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=groups
        )
        generator = torch.Generator().manual_seed(5)
        documents = torch.randint(0, 2, (3, 40), generator=generator).cumsum(1)
        zeros = torch.zeros_like(documents)
        q, k, v = (
            torch.randn(40, 3, heads, 16, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)
        )
        for bound in (None, 130, 600):
            params = MixedModalParams.of(
                modality_ids=zeros, position_ids=zeros, document_ids=documents, documents=bound
            )
            gradients = []
            CALLS.clear()
            for attention in (ours, fused):
                out = attention(q, k, v, packed_seq_params=params)
                gradients.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
            assert CALLS["fused_attn_fwd"] == CALLS["fused_attn_bwd"] == 1
            for mine, other in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)

    run_ranks(one, world_size=1)


def test_a_backend_is_not_chosen_anew_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other numbers of documents in every micro-batch, and layers that see a quarter of the tokens."""
    ends: list[int] = []
    attend = FusedDocumentAttention.forward

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        ends.append(len(kwargs["packed_seq_params"].document_ends()))
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(FusedDocumentAttention, "forward", seen)

    def one(ranks: RankEnv) -> None:
        start(ranks)
        for model in ("moma", "moma_depth"):
            settings = using(config(model, dtype="bf16"), "te")
            parts = build(settings, process_groups.initialize_layout())
            for step in range(3):
                CALLS.clear()
                batches = []
                for number in range(4):
                    mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5}, documents=2 + step + number)
                    batches.append(to_device(mixture.micro_batch(4 * step + number), mixture.vocabulary))
                assert len({batch.params.documents for batch in batches}) > 1
                parts.stepper.train(batches, lr=1e-3)
                assert CALLS["fused_attn_fwd"] == 16
                kinds = 2 if model == "moma_depth" else 1  # of layers
                assert CALLS["get_fused_attn_backend"] <= (kinds if step == 0 else 0), (model, step, CALLS)
            process_groups.destroy_layout()
        assert set(ends) == {33}

    run_ranks(one, world_size=1)


@pytest.mark.parametrize(
    ("capability", "flash", "environment", "fused"),
    [
        ((9, 0), False, {}, True),
        ((8, 0), False, {}, False),
        ((8, 0), True, {}, True),
        ((8, 0), True, {"NVTE_FLASH_ATTN": "0"}, False),
        ((9, 0), False, {"NVTE_FUSED_ATTN": "0"}, False),
    ],
)
def test_without_a_kernel_for_documents_attention_is_ours(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash: bool, environment: dict[str, str], fused: bool
) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(MACHINE, "capability", capability)
    utils: Any = importlib.import_module("transformer_engine.pytorch.utils")
    utils._get_device_compute_capability.cache_clear()

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        if flash:
            UTILS.FlashAttentionUtils.version = Version("2.7.4")
            UTILS.FlashAttentionUtils.set_flash_attention_version()
        settings = using(config("moma", dtype="bf16"), "te")
        assert takes_documents(transformer_config(settings)) == fused
        layer = build_chunks(settings, groups)[0].decoder.layers[0]
        wanted = FusedDocumentAttention if fused else DocumentAttention
        assert type(layer.self_attention.core_attention) is wanted

    try:
        run_ranks(one, world_size=1)
    finally:
        utils._get_device_compute_capability.cache_clear()
