"""Experts against a loop, and the exchange that brings tokens to them between simulated ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.config.derived import experts_of_ranks
from mmscale.model import experts as module
from mmscale.model.experts import Experts, from_experts, to_experts
from tests.unit.model.reference_parts import swiglu

HIDDEN, INNER = 6, 5


def config(**settings: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, **settings)  # type: ignore[arg-type]


def make(
    groups: ProcessGroupCollection, count: int, *, dtype: torch.dtype = torch.float32, own: range | None = None
) -> Experts:
    """Experts with random weights."""
    experts = Experts(config(params_dtype=dtype), count=count, width=INNER, groups=groups, own=own)
    generator = torch.Generator().manual_seed(count)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (1, 7), (3, 4), (4, 1), (2, 0)])
def test_forward_is_the_loop(count: int, tokens: int, process_groups: ProcessGroupCollection) -> None:
    experts = make(process_groups, count)
    x = torch.randn(count, tokens, HIDDEN, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = experts(x)
    assert got.shape == x.shape
    want = torch.stack(
        [
            torch.stack(
                [swiglu(x[e, n], experts.w1[e, :, 0], experts.w1[e, :, 1], experts.w2[e]) for n in range(tokens)]
            )
            if tokens
            else x[e]
            for e in range(count)
        ]
    )
    torch.testing.assert_close(got, want)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    inputs = (x, experts.w1, experts.w2)
    mine = torch.autograd.grad((got * direction).sum(), inputs)
    loop = torch.autograd.grad((want * direction).sum(), inputs, allow_unused=True)
    for gradient, reference in zip(mine, loop, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if reference is None else reference)


@pytest.mark.parametrize("expert_parallel", [True, False])
def test_parameters_tell_megatron_how_to_reduce_them(
    expert_parallel: bool, process_groups: ProcessGroupCollection
) -> None:
    own = range(2) if expert_parallel else None
    experts = make(process_groups, 2, dtype=torch.bfloat16, own=own)
    for parameter, axis in ((experts.w1, 3), (experts.w2, 1)):
        assert parameter.dtype is torch.bfloat16
        assert parameter.allreduce is not expert_parallel
        assert parameter.tensor_model_parallel and parameter.partition_dim == axis


def test_checkpoint_has_global_tensors(process_groups: ProcessGroupCollection) -> None:
    sharded = make(process_groups, 3, own=range(3)).sharded_state_dict("mlp.experts.text.")
    assert {key: entry.global_shape for key, entry in sharded.items()} == {
        "mlp.experts.text.w1": (3, HIDDEN, 2, INNER),
        "mlp.experts.text.w2": (3, INNER, HIDDEN),
    }


# --- exchange -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """As much of a process group as the exchange asks for."""

    ranks: int
    number: int = 0

    def rank(self) -> int:
        """This rank."""
        return self.number

    def size(self) -> int:
        """Number of ranks."""
        return self.ranks


def together(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., list[Tensor]],
    inputs: Sequence[Sequence[Tensor]],
    places: Sequence[Sequence[range]],
) -> list[list[Tensor]]:
    """Call an exchange on every rank: the first round records what each sends, the second hands out what it gets."""
    ranks = len(inputs)
    sent: list[tuple[Tensor, ...]] = []

    def record(_: Group, tensor: Tensor, here: list[int], there: list[int]) -> Tensor:
        sent.append(tensor.split(there))
        return tensor.new_zeros(sum(here), tensor.shape[1])

    monkeypatch.setattr(module, "all_to_all", record)
    for rank, own in enumerate(inputs):
        function(own, places, Group(ranks, rank))
    results = []
    for rank, own in enumerate(inputs):

        def deliver(_: Group, __: Tensor, here: list[int], ___: list[int], rank: int = rank) -> Tensor:
            parts = [tensors[rank] for tensors in sent]
            assert [part.shape[0] for part in parts] == here, "both ends agree on every split"
            return torch.cat(parts)

        monkeypatch.setattr(module, "all_to_all", deliver)
        results.append(function(own, places, Group(ranks, rank)))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("counts", [(4, 8), (7, 1), (1, 3, 2)])
@pytest.mark.parametrize("slots", [(3, 1, 2), (1, 5, 1)])
def test_tokens_reach_their_experts_and_come_back(
    ranks: int, counts: tuple[int, ...], slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of unequal sizes in one exchange, spread unequally where the ranks do not divide them."""
    slots = slots[: len(counts)]
    places = list(experts_of_ranks({str(number): count for number, count in enumerate(counts)}, ranks).values())
    generator = torch.Generator().manual_seed(0)
    chosen = [
        [torch.randn(e, c, HIDDEN, generator=generator) for e, c in zip(counts, slots, strict=True)]
        for _ in range(ranks)
    ]
    received = together(monkeypatch, to_experts, chosen, places)
    for group, capacity in enumerate(slots):
        for rank, own in enumerate(places[group]):
            assert received[rank][group].shape == (len(own), ranks * capacity, HIDDEN)
            for local, expert in enumerate(own):
                want = torch.cat([chosen[source][group][expert] for source in range(ranks)])
                assert torch.equal(received[rank][group][local], want)

    # Each expert leaves its mark, so that an answer from the wrong one would show.
    answered = []
    for rank in range(ranks):
        marks = [torch.tensor([expert + 1.0 for expert in own[rank]]) for own in places]
        answered.append([tokens * mark.view(-1, 1, 1) for tokens, mark in zip(received[rank], marks, strict=True)])
    returned = together(monkeypatch, from_experts, answered, places)
    for rank in range(ranks):
        for group, count in enumerate(counts):
            mark = torch.arange(count).view(-1, 1, 1) + 1.0
            assert torch.equal(returned[rank][group], chosen[rank][group] * mark)


def test_one_rank_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "all_to_all")
    tokens = [torch.randn(2, 3, HIDDEN)]
    for function in (to_experts, from_experts):
        (same,) = function(tokens, [[range(2)]], Group(1))
        assert same is tokens[0]
