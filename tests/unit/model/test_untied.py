"""Weights of each modality's own (model.untie): what the reference in loops of test_moma.py does not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from mmscale.config import ModalityVocab
from mmscale.config.rules import violations
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.untied import Rows, _grouped_mm, product, rows_of
from mmscale.plan import count_parameters
from mmscale.plan.compute import flops_per_token
from mmscale.tables.settings import UNTIED
from tests.unit.model.comparison import TOLERANCE, gradients, relative, run_model
from tests.unit.model.reference import TEXT_IDS, Batch, batch_of, random_documents, tiny, usual_batch

MOT = list(UNTIED)


def params(ids: list[list[int]]) -> MixedModalParams:
    """Facts of sequences of which only the modalities matter."""
    modality = torch.tensor(ids, dtype=torch.int8)
    zeros = torch.zeros(modality.shape, dtype=torch.int64)
    return MixedModalParams.of(modality_ids=modality, position_ids=zeros, document_ids=zeros.int())


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_product_is_the_sum_over_masks(modalities: int, seed: int) -> None:
    """Forward and backward, with modalities that have no token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, max(1, modalities - seed % 2), (3, 7), generator=generator)
    x = torch.randn(21, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = [
        torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(modalities)
    ]
    out = product(x, weights, rows_of(params(ids.tolist()), modalities))
    own = ids.t().reshape(-1)
    own = torch.where(own < 0, modalities - 1, own)
    expected = sum((own == m).unsqueeze(1) * (x @ weight.t()) for m, weight in enumerate(weights))
    torch.testing.assert_close(out, expected)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, [x, *weights], gradient)
    wanted = torch.autograd.grad(expected, [x, *weights], gradient)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_gpus_computes_the_same(dtype: torch.dtype) -> None:
    """With an empty group, and a gradient of strides zero."""
    rows = rows_of(params([[0, 2, -1, 0, 2, 2, 0, 0]]), 3)
    assert rows.counts == [4, 0, 4]
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 8, 16, dtype=dtype, requires_grad=True)
    on_device = Rows(rows.order, rows.back, rows.ends, None)
    results = []
    for one in (rows, on_device):
        out = product(x, list(weights), one)
        results.append((out, *torch.autograd.grad(out.sum(), [x, weights])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert _grouped_mm(x, weights, rows.ends).shape == (8, 8)


@pytest.mark.parametrize("kind", ["dense", "moma"])
def test_with_equal_weights_it_is_the_tied_model(kind: str, build: Callable[..., GPTModel]) -> None:
    """Logits, and gradients: that of a tied weight is the sum over the modalities."""
    untie = MOT if kind == "dense" else ["attention", "norms"]
    tied, untied = build(tiny(kind)), build(tiny(kind, untie=untie))
    given = dict(tied.named_parameters())
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(given[tied_name(name, given)])
    batch = usual_batch()
    logits, expected = run_model(untied, batch), run_model(tied, batch)
    assert relative(logits, expected) < TOLERANCE
    sums: dict[str, Tensor] = {}
    for name, gradient in gradients(untied, logits.square().mean()).items():
        own = tied_name(name, given)
        sums[own] = sums.get(own, torch.zeros_like(gradient)) + gradient
    for name, gradient in gradients(tied, expected.square().mean()).items():
        assert relative(sums[name], gradient) < 20 * TOLERANCE, name


def tied_name(name: str, given: dict[str, Any]) -> str:
    """The tied model's name of a parameter."""
    return name if name in given else f"{name.rpartition('.')[0]}.weight"


@pytest.mark.parametrize("image", [0.0, 1.0])
def test_a_batch_of_one_modality_gives_the_others_gradients_of_exactly_zero(
    image: float, build: Callable[..., GPTModel]
) -> None:
    """Not None: data-parallel ranks with other tokens reduce the same tensors."""
    model = build(tiny("dense", untie=MOT, norm="post"))
    batch = batch_of([random_documents((12,), seed=1, image=image)], length=12)
    found = gradients(model, run_model(model, batch).square().sum())
    absent, present = ("image", "text") if image == 0.0 else ("text", "image")
    for name, gradient in found.items():
        if name.endswith(f".{absent}"):
            assert torch.all(gradient == 0.0), name
        elif name.endswith(f".{present}"):
            assert gradient.abs().max() > 0.0, name


def test_later_tokens_change_nothing(build: Callable[..., GPTModel]) -> None:
    """Another modality at a later place neither moves nor changes an earlier token: it is causal as it stands."""
    model = build(tiny("dense", untie=MOT))
    tokens = random_documents((12,), seed=5)[0]
    whole: Batch = batch_of([[tokens]], length=12)
    before = run_model(model, whole)
    for place in range(6, 12):
        other = list(tokens)
        other[place] = 3 if tokens[place] >= TEXT_IDS else TEXT_IDS + 3
        after = run_model(model, batch_of([[other]], length=12))
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert (after[:, place] - before[:, place]).abs().max() > 0.0


def test_the_plan_counts_a_dense_model_per_token() -> None:
    """Active parameters and FLOPs are those of the dense model; the rest exists once more for each other modality."""
    more = (ModalityVocab(name="audio", size=6),)
    share = {"text": 0.5, "image": 0.3, "audio": 0.2}
    dense = tiny("dense", more=more)
    mot = tiny("dense", more=more, untie=MOT)
    mot = replace_share(mot, share)
    one, other = count_parameters(dense), count_parameters(mot)
    assert other.active == one.active
    layers = one.total - one.embedding - one.output
    assert other.total == one.total + 2 * layers
    assert other.per_modality == dict.fromkeys(share, layers)
    assert flops_per_token(mot).as_dict() == pytest.approx(flops_per_token(dense).as_dict())


def replace_share(config: Any, share: dict[str, float]) -> Any:
    """The configuration with nominal shares of its modalities."""
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


FP8: dict[str, Any] = {"precision": {"dtype": "bf16", "fp8": "delayed"}}


@pytest.mark.parametrize(
    ("kind", "model", "other", "said"),
    [
        ("moma", {"untie": ["ffn"]}, {}, "are experts"),
        ("dense", {"untie": ["norms", "norms"]}, {}, "twice"),
        ("dense", {"untie": ["attention"], "qkv_bias": True}, {}, "no biases"),
        ("dense", {"untie": ["ffn"]}, FP8 | {"optim": {"freeze": ["text"]}}, "text, whose ffn is untied"),
        ("dense", {"untie": ["attention"]}, FP8 | {"optim": {"freeze": ["image.attention"]}}, "image, whose attention"),
        ("dense", {"untie": ["ffn"]}, {"parallel": {"tp": 2, "overlap_tensor": True}}, "Transformer-Engine's linears"),
    ],
)
def test_what_is_refused(kind: str, model: dict[str, Any], other: dict[str, Any], said: str) -> None:
    config = tiny(kind, **model)
    config = type(config).model_validate(config.model_dump() | other)
    assert any(said in problem.cause for problem in violations(config))


@pytest.mark.parametrize(
    ("other", "model"),
    [
        (FP8, {}),
        (FP8 | {"optim": {"freeze": ["text.norms"]}}, {}),
        (FP8 | {"optim": {"freeze": ["text", "image"]}}, {}),
        ({"precision": FP8["precision"] | {"fp8_emulate": True}, "optim": {"freeze": ["text"]}}, {}),
        (FP8 | {"optim": {"freeze": ["text.experts"]}}, {"untie": ["attention"]}),
    ],
    ids=str,
)
def test_what_fp8_does_not_refuse(other: dict[str, Any], model: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "seq_length": 32}
    config = tiny("moma" if model else "dense", **sizes, **({"untie": MOT} | model))
    config = type(config).model_validate(config.model_dump() | other)
    assert violations(config) == []


def test_one_modality_is_refused() -> None:
    config = tiny("dense", untie=["ffn"])
    one = config.vocab.model_copy(update={"modalities": config.vocab.modalities[:1]})
    assert any("one modality" in problem.cause for problem in violations(config.model_copy(update={"vocab": one})))


def test_every_sequence_of_a_micro_batch_has_its_own_modalities(build: Callable[..., GPTModel]) -> None:
    model, batch = build(tiny("dense", untie=MOT)), usual_batch()
    both = run_model(model, batch)
    alone = torch.cat([run_model(model, batch.rows(row)) for row in (0, 1)])
    torch.testing.assert_close(both, alone)
    swapped = replace(batch, modality=batch.modality.flip(0))
    assert relative(run_model(model, swapped), both) > 100 * TOLERANCE
