"""What the plan says a rank sends, against the collectives that a real step makes: how many, and of how many bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.plan import Operation, communication
from mmscale.runtime import groups
from mmscale.train import parts
from mmscale.train.batch import to_device
from mmscale.train.optim import apply
from mmscale.train.synthetic import SyntheticMixture
from mmscale.train.verify import with_share
from tests.distributed.layouts import config
from tests.support import Ranks, distributed

# Numbers of tokens, which the plan does not count.
_SMALL = 256
# Which argument of an operation of torch.distributed is the whole tensor.
_OPERATIONS = {
    "c10d::_allgather_base_": (Operation.ALL_GATHER, 0),
    "c10d::_reduce_scatter_base_": (Operation.REDUCE_SCATTER, 1),
    "c10d::allgather_into_tensor_coalesced_": (Operation.ALL_GATHER, 0),
    "c10d::reduce_scatter_tensor_coalesced_": (Operation.REDUCE_SCATTER, 1),
    "c10d::allreduce_": (Operation.ALL_REDUCE, 0),
    "c10d::alltoall_base_": (Operation.ALL_TO_ALL, 1),
    "c10d::send": (Operation.SEND, 0),
}
Key = tuple[str, int]


class _Collectives(TorchDispatchMode):
    """Counts calls and bytes of collectives by (operation, ranks)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and name in _OPERATIONS:
            operation, place = _OPERATIONS[name]
            whole = args[place]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            group = next(
                arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if ranks > 1 and size > _SMALL:
                key = str(operation), ranks if operation is not Operation.SEND else 0
                self.calls[key] += 1
                self.bytes[key] += size
        return func(*args, **(kwargs or {}))


def _planned(settings: Config, world: int, stage: int) -> tuple[Counter[Key], Counter[Key]]:
    calls: Counter[Key] = Counter()
    volume: Counter[Key] = Counter()
    for entry in communication(settings, world, stage=stage):
        key = str(entry.operation), entry.ranks if entry.operation is not Operation.SEND else 0
        calls[key] += entry.calls
        volume[key] += round(entry.payload)
    return calls, volume


def _found(settings: Config) -> _Collectives:
    """One step on this rank."""
    collection = groups.collection()
    settings = with_share(settings)
    share = settings.model.experts.share
    assert isinstance(share, dict)
    built = parts.build(settings, collection)
    mixture, vocabulary = SyntheticMixture(settings, share=share), Vocabulary.from_config(settings.vocab)
    number = settings.train.global_batch_size // settings.train.micro_batch_size
    batches = [
        to_device(mixture.micro_batch(index), vocabulary)
        for index in range(collection.dp.rank(), number, collection.dp.size())
    ]
    with _Collectives() as seen:
        built.stepper.accumulate(batches)
        built.optimizer.prepare_grads()
        apply(built.optimizer, 1.0)
    return seen


_LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"tp": 2, "recompute": "full"}),
    ("moma_depth", {"tp": 2, "ep": 2}),
    ("moma", {"pp": 2, "vpp": 2, "ep": 2}),
    ("moma_post_per_expert_shared", {"tp": 2, "pp": 2}),
    ("moma_post", {"ep": 4, "recompute": "full"}),
    ("moma", {"tp": 2, "ep": 2, "recompute": "selective", "recompute_modules": ["mlp"]}),
]


@distributed(world_size=4)
def test_calls_and_bytes_of_a_step(ranks: Ranks) -> None:
    groups.start(ranks)
    failures = []
    for model, parallel in _LAYOUTS:
        # On gloo the default is no overlap, the plan's default is NCCL's.
        settings = config(model, dtype="bf16", parallel=parallel | {"overlap_grad_reduce": False})
        layout = settings.parallel
        groups.initialize_layout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, seed=1)
        stage = groups.collection().pp.rank()
        found = _found(settings)
        groups.destroy_layout()
        calls, volume = _planned(settings, ranks.world_size, stage)
        assert volume, "a layout without messages shows nothing"
        failures += [
            f"{model} {parallel} stage {stage}: {key} planned {calls[key]} calls, {volume[key]} bytes; "
            f"found {found.calls[key]}, {found.bytes[key]}"
            for key in sorted(calls.keys() | found.calls.keys())
            # Buffers of gradients and parameters are padded.
            if calls[key] != found.calls[key] or volume[key] != pytest.approx(found.bytes[key], rel=0.01, abs=2048)
        ]
    groups.finalize()
    assert not failures, "\n".join(failures)
