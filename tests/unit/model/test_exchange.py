"""Order of what happens in a layer whose exchange travels: other groups compute while messages are under way.

That results are those of one process is tests/distributed/test_expert_overlap.py's subject. Here a fake process group
stands for the other rank, so that the order is all there is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmscale.config import Config
from mmscale.model import exchange
from mmscale.model.build import build_chunks
from mmscale.model.experts import Experts
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device
from tests.distributed.layouts import config
from tests.support import run_ranks

SHARED = {"shared": 1}


def one_layer(**experts: Any) -> Config:
    settings = config("moma", parallel={"ep": 2, "overlap_experts": True})
    changed = settings.model.experts.model_copy(update=experts)
    return settings.model_copy(
        update={"model": settings.model.model_copy(update={"num_layers": 1, "experts": changed})}
    )


def order_of(settings: Config) -> tuple[list[str], list[str]]:
    """Starts and waits of messages and the experts' computations, in forward and in backward."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    pg = groups.initialize_layout(ep=2, seed=1)
    (model,) = build_chunks(settings, pg)
    happened: list[str] = []
    names = {id(part): name for name, part in model.decoder.layers[0].mlp.experts.items()}

    class Message(exchange._Message):
        def __init__(self, rows: Tensor, *arguments: Any) -> None:
            super().__init__(rows, *arguments)
            happened.append("start")

        def wait(self) -> None:
            super().wait()
            happened.append("wait")

    def computed(part: Experts, _: Any, output: Tensor) -> None:
        name = names.get(id(part), "shared")
        happened.append(name)
        output.register_hook(lambda _: happened.append(name))

    exchange._Message = Message  # type: ignore[misc]  # in a process of its own
    for part in model.modules():
        if isinstance(part, Experts):
            part.register_forward_hook(computed)
    mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5})
    batch = to_device(mixture.micro_batch(0), mixture.vocabulary)
    output = model(input_ids=batch.tokens, position_ids=None, attention_mask=None, packed_seq_params=batch.params)
    forward = list(happened)
    happened.clear()
    output.sum().backward()
    groups.finalize()
    return forward, happened


@pytest.mark.parametrize("experts", [{}, SHARED])
def test_groups_compute_while_messages_travel(experts: dict[str, int]) -> None:
    def check(ranks: RankEnv) -> None:
        del ranks
        forward, backward = order_of(one_layer(**experts))
        shared = ["shared"] if experts else []
        # Image tokens travel while the text group computes, whose outputs travel while the image group does.
        assert forward == [
            *("start", "start", *shared),
            *("wait", "text", "start"),
            *("wait", "image", "start"),
            *("wait", "wait"),
        ]
        within = [what for what in backward if what != "shared"]  # anywhere: it waits for no message
        assert within == [
            *("start", "start"),
            *("wait", "image", "start"),
            *("wait", "text", "start"),
            *("wait", "wait"),
        ]

    run_ranks(check, world_size=1)
