"""The trainer's side of the gate continues a text as `generate` does, up to the same ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from checkpoints_tools.huggingface.gate import NEW_TOKENS, _continued
from mmscale.data.vocab import EOS
from tests.unit.checkpoints_tools.huggingface.test_modeling_moma import MODELS, exported
from tests.unit.model.reference import random_documents

DOCUMENT = np.array(random_documents((12, 12), seed=5)[0])
BEGINS = [DOCUMENT[:4], DOCUMENT[:7]]


@pytest.mark.parametrize("place", [0, 2, NEW_TOKENS - 1])
def test_a_continuation_ends_where_generation_does(place: int) -> None:
    """An answer may end before the document: fine-tuned models write `<eot>`."""
    model = exported(MODELS["moma"], routing="causal")

    @torch.no_grad()
    def logits(rows: Sequence[np.ndarray]) -> Tensor:
        width = max(map(len, rows))
        computed = [model(torch.from_numpy(row)[None]).logits[0] for row in rows]
        return torch.stack([pad(one, (0, 0, 0, width - len(one))) for one in computed])

    def continued(ends: tuple[int, ...]) -> list[list[int]]:
        found = _continued(logits, BEGINS, new_tokens=NEW_TOKENS, never=[0], ends=ends)
        return [one.new for one in found]

    end = continued(())[0][place]
    ends = (EOS, end)
    wanted = []
    for begin in BEGINS:
        ids = torch.from_numpy(begin)[None]
        whole = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=[0], eos_token_id=list(ends)
        )
        wanted.append(whole[0, len(begin) :].tolist())
    assert continued(ends) == wanted
    assert wanted[0][-1] == end and len(wanted[0]) <= place + 1
