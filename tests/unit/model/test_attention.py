"""Attention within documents: against loops, and what a document may not see of its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.model.attention import DocumentAttention
from mmscale.model.mixed_modal import MixedModalParams, padded_sequences
from tests.unit.model.comparison import params_of, run_model
from tests.unit.model.reference import Batch, batch_of, random_documents, tiny

LENGTH = 14
A, B, C = (random_documents((n,), seed=20 + n)[0] for n in (5, 4, 3))


def attend(query: Tensor, key: Tensor, value: Tensor, documents: list[list[int]], scale: float) -> Tensor:
    """[S, B, H, D] -> [S, B, H * D], one token at a time."""
    length, batch, heads, width = query.shape
    repeats = heads // key.shape[2]
    out = torch.zeros(length, batch, heads, width, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(i + 1) if documents[b][j] == documents[b][i]]
                scores = torch.stack([query[i, b, h] @ key[j, b, h // repeats] * scale for j in seen])
                weights = torch.softmax(scores, dim=0)
                out[i, b, h] = sum(w * value[j, b, h // repeats] for w, j in zip(weights, seen, strict=True))
    return out.reshape(length, batch, heads * width)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("documents", [[[0] * 6, [0, 0, 0, 1, 1, -1]], [[0, 1, 2, 3, 4, 5], [7, 7, 3, 3, 3, 3]]])
def test_document_attention_is_the_loops(kv_heads: int, scale: float | None, documents: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 2, 4, 5, generator=generator)
    key, value = (torch.randn(6, 2, kv_heads, 5, generator=generator) for _ in range(2))
    document = torch.tensor(documents)
    params = MixedModalParams.of(
        modality_ids=torch.zeros_like(document), position_ids=torch.zeros_like(document), document_ids=document
    )
    config = TransformerConfig(num_layers=1, hidden_size=20, num_attention_heads=4)
    attention = DocumentAttention(config, 1, softmax_scale=scale)
    expected = attend(query, key, value, documents, 1 / math.sqrt(5) if scale is None else scale)
    torch.testing.assert_close(attention(query, key, value, packed_seq_params=params), expected)
    # On CUDA a mask does what calls for each document do on a host.
    torch.testing.assert_close(attention._masked(query, key, value, params.attention_bias(query.dtype)), expected)


def test_without_facts_it_is_causal() -> None:
    query, key, value = torch.randn(3, 5, 1, 2, 4).unbind(0)
    attention = DocumentAttention(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2), 1)
    torch.testing.assert_close(attention(query, key, value), attend(query, key, value, [[0] * 5], 0.5))


def test_bias_keeps_to_documents_and_to_a_selection() -> None:
    document = torch.tensor([[0, 0, 1, 1, 1, 2]])
    zeros = torch.zeros_like(document)
    params = MixedModalParams.of(modality_ids=zeros, position_ids=zeros, document_ids=document)
    bias = params.attention_bias(torch.float32)
    assert params.attention_bias(torch.float32) is bias  # made once
    chosen = params.select(torch.tensor([[0], [2], [4]]))
    assert bias.shape == (1, 1, 6, 6)
    for i in range(6):
        for j in range(6):
            assert bias[0, 0, i, j] == (0.0 if j <= i and document[0, i] == document[0, j] else float("-inf"))
    own = chosen.attention_bias(torch.float32)  # not the cached one of the full sequence
    assert (own[0, 0] == 0).tolist() == [[True, False, False], [False, True, False], [False, True, True]]


# --- leaks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(build: Callable[..., GPTModel]) -> GPTModel:
    return build(tiny("dense", seq_length=LENGTH, num_query_groups=2))


def where(documents: list[list[int]], number: int) -> slice:
    start = sum(len(tokens) for tokens in documents[:number])
    return slice(start, start + len(documents[number]))


@pytest.mark.parametrize(
    ("documents", "number"), [([A, B, C], 0), ([B, A, C], 1), ([C, B, A], 2), ([B, C, A], 2), ([C, C, A], 2)]
)
def test_a_document_does_not_see_its_neighbours(documents: list[list[int]], number: int, dense: GPTModel) -> None:
    alone = run_model(dense, batch_of([[A]], length=LENGTH))[0, : len(A)]
    packed = run_model(dense, batch_of([documents], length=LENGTH))[0, where(documents, number)]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def one_document(batch: Batch) -> Batch:
    """The same tokens and positions without the boundaries."""
    return Batch(batch.ids, batch.modality, batch.position, torch.zeros_like(batch.document))


def without_restart(batch: Batch) -> Batch:
    """The same documents with positions counted through the sequence."""
    return Batch(batch.ids, batch.modality, torch.arange(LENGTH).expand_as(batch.position), batch.document)


def test_without_the_mask_it_would(dense: GPTModel) -> None:
    """Control: boundaries are what the test above feels."""
    alone = run_model(dense, batch_of([[A]], length=LENGTH))[0, : len(A)]
    packed = run_model(dense, one_document(batch_of([[B, A]], length=LENGTH)))[0, where([B, A], 1)]
    assert (packed - alone).abs().max() > 0.1


def test_positions_restart_and_only_their_differences_matter(dense: GPTModel) -> None:
    """RoPE is relative: within a document a shift of all positions changes nothing, a stretch does."""
    batch = batch_of([[B, A]], length=LENGTH)
    own = where([B, A], 1)
    restarted = run_model(dense, batch)[0, own]
    torch.testing.assert_close(run_model(dense, without_restart(batch))[0, own], restarted, rtol=1e-4, atol=1e-4)
    stretched = Batch(batch.ids, batch.modality, batch.position * 2, batch.document)
    assert (run_model(dense, stretched)[0, own] - restarted).abs().max() > 0.01


def input_gradient(model: GPTModel, batch: Batch, rows: slice) -> Tensor:
    """Gradient [S, H] of some tokens' logits with respect to the embedded tokens."""
    embedded: list[Tensor] = []

    def keep(_: object, __: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(keep)
    try:
        logits = run_model(model, batch)
    finally:
        hook.remove()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * direction)[0, rows].sum(), embedded[0])
    return gradient[:, 0]


def test_gradients_do_not_cross_documents(dense: GPTModel) -> None:
    batch, own = batch_of([[B, A, C]], length=LENGTH), where([B, A, C], 1)
    outside = torch.ones(LENGTH, dtype=torch.bool)
    outside[own] = False
    gradient = input_gradient(dense, batch, own)
    assert torch.all(gradient[outside] == 0.0)
    assert torch.all(gradient[own].abs().sum(dim=-1) > 0.0)
    leaking = input_gradient(dense, one_document(batch), own)
    assert leaking[: own.start].abs().max() > 0.01  # control
    assert torch.all(leaking[own.stop :] == 0.0)  # still causal


@pytest.mark.parametrize("kind", ["dense", "moe", "moma"])
@pytest.mark.parametrize("norm", ["pre", "post", "post_per_expert"])
def test_padding_gives_no_nan(kind: str, norm: str, build: Callable[..., GPTModel]) -> None:
    """Also a sequence, and a micro-batch, of padding only."""
    model = build(tiny(kind, norm=norm, seq_length=LENGTH))
    for sequences in ([[A], []], [[], []]):
        model.zero_grad(set_to_none=True)
        logits = run_model(model, batch_of(sequences, length=LENGTH))
        logits.square().sum().backward()
        assert torch.isfinite(logits).all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", ["dense", "moe", "moma"])
def test_padding_is_not_seen(kind: str, build: Callable[..., GPTModel]) -> None:
    """No output of a real token depends on padding: not by attention, not by taking an expert's slot."""
    batch = batch_of([[A, B]], length=LENGTH)
    real = slice(0, len(A) + len(B))
    gradient = input_gradient(build(tiny(kind, seq_length=LENGTH)), batch, real)
    assert torch.all(gradient[real.stop :] == 0.0)
    assert torch.all(gradient[real].abs().sum(dim=-1) > 0.0)


def test_rotary_table_is_looked_up_by_position() -> None:
    batch = batch_of([[A, B]], length=LENGTH)
    table = torch.arange(LENGTH * 4, dtype=torch.float32).view(LENGTH, 1, 1, 4)
    angles = params_of(batch).rotary(table)
    assert angles.shape == (LENGTH, 1, 1, 4)
    for place, position in enumerate(batch.position[0].tolist()):
        assert torch.equal(angles[place, 0, 0], table[position, 0, 0])


def test_numbers_of_documents_that_kernels_are_told_are_few() -> None:
    counts = range(1, 8193)
    padded = [padded_sequences(count) for count in counts]
    assert all(told >= count for told, count in zip(padded, counts, strict=True))
    assert all(
        told <= max(32, 2 * count if count <= 512 else 1.25 * count) for told, count in zip(padded, counts, strict=True)
    )
    assert padded == sorted(padded)
    assert sorted(set(padded))[:9] == [32, 64, 128, 256, 512, 640, 768, 896, 1024]
    assert len(set(padded)) == 5 + 4 * 4  # 32 to 512, and four in each of the octaves up to 8192


@pytest.mark.parametrize("documents", [None, 3, 33, 600])
def test_ends_of_documents_with_empty_ones_behind_them(documents: int | None) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 5, 5]])
    params = MixedModalParams.of(
        modality_ids=torch.zeros_like(ids), position_ids=torch.zeros_like(ids), document_ids=ids, documents=documents
    )
    ends = params.document_ends().tolist()
    assert ends[:5] == [0, 2, 5, 6, 10] and set(ends[5:]) <= {10}
    assert len(ends) == 1 + {None: 4, 3: 32, 33: 64, 600: 640}[documents]
