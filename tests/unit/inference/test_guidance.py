"""Guidance is compared on held-out items as generation would use it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.data.vocab import BOI, BOS, EOI, EOS
from mmscale.inference import guidance
from mmscale.inference.generate import ItemRules
from mmscale.inference.guidance import GuidanceSweep, items_behind_prompts, sweep
from tests.unit.inference.test_generate import END, FIRST, HOLE, IMAGE, TOKENS, model, rules

A, B = 7, 8  # prompts


class HalfListening:
    """Knows which of two codes follows a prompt, but only half as well (in log-odds) as it should.

    In truth code 0 follows A in 9 of 10 documents, and B in 1 of 10.
    """

    device = torch.device("cpu")

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, FIRST + 2)
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, :, FIRST] = np.log(9) / 2 * ((A in ids) - (B in ids))
        return SimpleNamespace(logits=logits)


def test_a_model_that_half_listens_is_guided_by_two() -> None:
    item = ItemRules("image", FIRST, FIRST + 2, 1, BOI, EOI, rules().grammar, rules().strength)
    documents = []
    for prompt, likely in ((A, FIRST), (B, FIRST + 1)):
        for number in range(10):
            code = likely if number else 2 * FIRST + 1 - likely
            documents.append(np.array([BOS, prompt, BOI, code, EOI, EOS]))
    found = sweep(HalfListening(), documents, item)
    assert found is not None and found.items == 20
    assert found.best == 2.0
    truth = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert found.losses[2.0] == pytest.approx(truth, rel=1e-6)
    assert found.losses[1.0] > truth < found.losses[3.0] < found.losses[5.0]
    assert GuidanceSweep(1, {1.0: 0.5, 2.0: 0.5}).best == 1.0  # of equal ones the least


@pytest.mark.parametrize(("name", "before"), [("dense", (BOS,)), ("moma and depth", (BOS, HOLE))])
def test_as_in_a_loop_over_tokens(name: str, before: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of several lengths, one with two images, of which the first has no prompt."""
    monkeypatch.setattr(guidance, "GUIDANCES", (1.0, 2.5))
    own = model(name)
    assert guidance._keeps(own)
    documents = [[BOS, *IMAGE, 9, *IMAGE, EOS], [BOS, 7, 9, 11, *IMAGE, EOS], [BOS, 7, 9, EOS]]
    found = sweep(own, [np.array(ids) for ids in documents], rules(), before=before)
    want = {1.0: [], 2.5: []}
    for ids, begun in ((documents[0], 8), (documents[1], 4)):
        for number in range(TOKENS):
            place = begun + 1 + number
            given = own(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(dim=-1)
            alone = own(torch.tensor([[*before, *ids[begun:place]]])).logits[0, -1].log_softmax(dim=-1)
            for scale, losses in want.items():
                guided = (alone + scale * (given - alone))[FIRST:END].log_softmax(dim=-1)
                losses.append(-float(guided[ids[place] - FIRST]))
    assert found is not None and found.items == 2
    assert found.losses == pytest.approx({scale: np.mean(losses) for scale, losses in want.items()}, rel=1e-4)


class LargestFloats(TorchDispatchMode):
    """Notes the size of the largest tensor of fp32 or fp64 that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, out.numel())
        return out


class Wide:
    """Logits in bf16 over a vocabulary that is much larger than the item's range."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def forward(self, *, input_ids: Tensor, logits_to_keep: int = 0, **_: Any) -> Any:
        self.asked.append((*input_ids.shape, logits_to_keep))
        return SimpleNamespace(logits=torch.zeros(len(input_ids), logits_to_keep, 3000, dtype=torch.bfloat16))

    __call__ = forward


def test_memory_is_that_of_the_items_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70 long documents few are computed at once, and only the item's places and range are made fp32."""
    monkeypatch.setattr(guidance, "GUIDANCES", (2.0,))
    lengths = [*range(100, 165), 500, 600, 700, 3000, 9000]
    documents = [np.array([BOS, *[A] * length, *IMAGE, EOS]) for length in lengths]
    wide, largest = Wide(), LargestFloats()
    with largest:
        found = sweep(wide, documents, rules())
    assert found is not None and found.items == len(lengths)
    assert found.losses[2.0] == pytest.approx(np.log(END - FIRST), rel=1e-6)
    most = max(rows for rows, _, _ in wide.asked)
    assert most > 16 and largest.largest == most * TOKENS * (END - FIRST)
    assert all(rows == 1 or rows * width <= guidance._TOKENS for rows, width, _ in wide.asked)
    assert all(kept == TOKENS for rows, _, kept in wide.asked if rows == 1)
    assert sum(rows * kept for rows, _, kept in wide.asked) < 0.5 * sum(rows * width for rows, width, _ in wide.asked)


def test_which_items_count() -> None:
    assert items_behind_prompts(np.array([BOS, *IMAGE, EOS]), rules()) == []  # read, not drawn
    assert items_behind_prompts(np.array([BOS, 9, *IMAGE, *IMAGE, EOS]), rules()) == [2, 8]
    assert items_behind_prompts(np.array([BOS, 9, *IMAGE[:-2], EOS]), rules()) == []  # not whole
    assert sweep(None, [np.array([BOS, 9, EOS])], rules()) is None
