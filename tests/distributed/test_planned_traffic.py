"""What the plan says a rank sends, against the collectives that a real step makes: how many, and of how many bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.plan import Operation, communication
from mmscale.runtime import groups
from mmscale.train import assembly
from mmscale.train.optim.optimizer import apply
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import with_share
from mmscale.train.steps.batch import part_of, to_device
from tests.distributed.collectives import Collectives, Key
from tests.distributed.layouts import config
from tests.support import Ranks, distributed

# Numbers of tokens, which the plan does not count.
_SMALL = 128


def _planned(settings: Config, world: int, stage: int) -> tuple[Counter[Key], Counter[Key]]:
    calls: Counter[Key] = Counter()
    volume: Counter[Key] = Counter()
    for entry in communication(settings, world, stage=stage):
        key = str(entry.operation), 2 if entry.operation is Operation.SEND else entry.ranks
        calls[key] += entry.calls
        volume[key] += round(entry.payload)
    return calls, volume


def _found(settings: Config) -> Collectives:
    """One step on this rank."""
    collection = groups.collection()
    settings = with_share(settings)
    share = settings.model.experts.share
    assert isinstance(share, dict)
    built = assembly.build(settings, collection)
    mixture, vocabulary = SyntheticMixture(settings, share=share), Vocabulary.from_config(settings.vocab)
    number = settings.train.global_batch_size // settings.train.micro_batch_size
    batches = [to_device(content, vocabulary) for content in part_of(collection).batch(mixture, 0, number)]
    with Collectives(above=_SMALL) as seen:
        built.stepper.accumulate(batches)
        built.optimizer.prepare_grads()
        apply(built.optimizer, 1.0)
    return seen


def _fullest(mine: Collectives, stage: int) -> Collectives:
    """The most that any rank of this pipeline stage makes: some have fewer experts of a group than others."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (stage, dict(mine.calls), dict(mine.payload)))
    for other, calls, payload in gathered:
        if other == stage:
            mine.calls |= Counter(calls)
            mine.payload |= Counter(payload)
    return mine


_LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"tp": 2, "recompute": "full"}),
    ("moma_depth", {"tp": 2, "ep": 2}),
    ("moma", {"pp": 2, "vpp": 2, "ep": 2}),
    ("moma_post_per_expert_shared", {"tp": 2, "pp": 2}),
    ("moma_post", {"ep": 4, "recompute": "full"}),
    ("moma_7t1i", {"ep": 4}),
    ("moe_token_choice", {"tp": 2, "ep": 2}),
    ("moma_one_kv_head", {"tp": 4}),
    ("mot", {"tp": 2, "recompute": "full"}),
    ("mot_frozen", {"tp": 2, "pp": 2}),
    ("moma_untied", {"tp": 2, "ep": 2}),
    ("mot_post_depth", {"cp": 2, "tp": 2}),
    ("mot_4t1i", {"tp": 2, "ep": 2}),
    ("mot_4t1i", {"cp": 2, "ep": 2, "recompute": "full"}),
    ("moma_five_layers", {"pp": 2, "ep": 2, "pp_layers": (2, 3)}),
    ("moma_7t1i", {"tp": 2, "ep": 2}),
    ("moma", {"tp": 2, "ep": 2, "recompute": "selective", "recompute_modules": ["mlp"]}),
    ("dense", {"cp": 4}),
    ("moma_depth", {"cp": 2, "tp": 2}),
    ("moma_7t1i", {"cp": 2, "ep": 4}),
    ("moma_post_per_expert_shared", {"cp": 2, "pp": 2, "recompute": "full"}),
    ("moma_one_kv_head", {"cp": 2, "tp": 2, "ep": 2, "recompute": "selective", "recompute_modules": ["core_attn"]}),
]


# Those of `make test`: each kind of parallelism, and experts, routers of depth and untied weights.
_SHORT = [_LAYOUTS[number] for number in (1, 2, 11)]
_LONG = [row for row in _LAYOUTS if row not in _SHORT]


@pytest.mark.parametrize("layouts", [_SHORT, pytest.param(_LONG, marks=pytest.mark.long)], ids=["", "more"])
@distributed(world_size=4)
def test_calls_and_bytes_of_a_step(ranks: Ranks, layouts: list[tuple[str, dict[str, Any]]]) -> None:
    groups.start(ranks)
    failures = []
    for model, parallel in layouts:
        # On gloo the default is no overlap, the plan's default is NCCL's.
        data = {"document_multiple": 8} if "cp" in parallel else {}
        settings = config(model, dtype="bf16", parallel=parallel | {"overlap_grad_reduce": False}, data=data)
        # Routers that are trained beside the model take no part in the step that is counted here.
        off = settings.model.auxiliary.model_copy(update={"mode": "off"})
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"auxiliary": off})})
        layout = settings.parallel
        groups.initialize_layout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, cp=layout.cp, seed=1)
        stage = groups.collection().pp.rank()
        found = _fullest(_found(settings), stage)
        groups.destroy_layout()
        calls, volume = _planned(settings, ranks.world_size, stage)
        assert volume, "a layout without messages shows nothing"
        failures += [
            f"{model} {parallel} stage {stage}: {key} planned {calls[key]} calls, {volume[key]} bytes; "
            f"found {found.calls[key]}, {found.payload[key]}"
            for key in sorted(calls.keys() | found.calls.keys())
            # Buffers of gradients and parameters are padded.
            if calls[key] != found.calls[key] or volume[key] != pytest.approx(found.payload[key], rel=0.01, abs=2048)
        ]
    groups.finalize()
    assert not failures, "\n".join(failures)
