"""What a step's choices leave behind does not grow with its number of micro-batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch

from mmscale.model.auxiliary import RouterLearning, RouterRecord
from mmscale.model.step_sums import FirstPass, Key, Loads


class Router(torch.nn.Module):
    """Predicts one expert's choice from the token."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Parameter(torch.ones(1, 2))
        self.threshold = torch.zeros(1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.out.t()


def loads() -> tuple[Callable[[Key], None], Callable[[], bytes], Callable[[], float]]:
    kept, bias, taken = Loads(), torch.zeros(2), torch.ones(4, 1, 2, dtype=torch.bool)

    def tokens() -> float:
        return sum(float(sums[0]) for _, sums in kept.sums.values())

    return lambda key: kept.add(bias, taken, key=key), lambda: pickle.dumps(vars(kept)), tokens


def routers() -> tuple[Callable[[Key], None], Callable[[], bytes], Callable[[], float]]:
    kept, router = RouterLearning(gradients=False), Router()
    hidden, choice, mask = torch.ones(4, 1, 2), torch.ones(4, 1, 1, dtype=torch.bool), torch.ones(4, 1).bool()

    def observe(key: Key) -> None:
        layer, kind, number = key
        kept.observe(router, hidden, choice, {"text": mask}, layer=layer, kind=kind, micro_batch=number)  # type: ignore[arg-type]

    def tokens(record: RouterRecord) -> float:
        return float(record.decisions)

    return observe, lambda: pickle.dumps(vars(kept)), lambda: sum(map(tokens, kept.records.values()))


@pytest.mark.parametrize("owner", [loads, routers])
@pytest.mark.parametrize("in_flight", [1, 3], ids=["recomputed", "recomputed in a pipeline"])
def test_repeats_are_not_counted_and_nothing_grows(
    owner: Callable[[], tuple[Callable[[Key], None], Callable[[], bytes], Callable[[], float]]], in_flight: int
) -> None:
    """A layer sees each micro-batch again, by recompute, after it has seen up to `in_flight` - 1 later ones."""

    def size(micro_batches: int) -> int:
        add, content, tokens = owner()
        for number in range(micro_batches + in_flight - 1):
            for seen in (number, number - in_flight + 1):
                if 0 <= seen < micro_batches:
                    for layer in (1, 2):
                        add((layer, "text", seen))
        assert tokens() == 2 * 4 * micro_batches
        return len(content())

    assert size(200) <= size(1) + 64


def test_a_step_that_is_computed_again_counts_anew() -> None:
    first = FirstPass()
    assert [first.of((1, "text", number)) for number in (4, 4, 5, 4)] == [True, False, True, False]
    first.clear()
    assert first.of((1, "text", 4)) and first.of((2, "text", 4))
