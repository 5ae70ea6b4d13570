"""One rank of a simulated world: torch's fake process group, tensors without memory, counted messages.

Everything else is real: megatron-core's groups, the model, gradient buffers, schedules, the optimizer. Tensors have
shapes but no values, so a rank of a large model on many ranks takes seconds and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmscale.config import Config
from mmscale.model import build as model_build
from mmscale.model.attention import DocumentAttention
from mmscale.runtime import groups
from mmscale.train.assembly import TrainingParts, build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import part_of, to_device
from tests.distributed.collectives import Collectives


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds between two steps."""

    parameters: int
    gradients: int
    optimizer: int


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def rank_of(config: Config, rank: int, world: int) -> Iterator[ProcessGroupCollection]:
    """Act as this rank, in megatron-core's groups of the configuration's layout. One at a time, in its own process."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel = config.parallel
    try:
        yield groups.initialize_layout(
            tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=1
        )
    finally:
        groups.finalize()


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Skips code that needs values of tensors: initial weights, checks between ranks, conversions to the same type."""

    def everyone_says(said: list[Any], mine: Any, group: Any = None) -> None:
        said[:] = [mine] * len(said)

    class Sent:
        def wait(self) -> None:
            """There is nothing to wait for."""

    @contextlib.contextmanager
    def one_by_one(*_: Any, **__: Any) -> Iterator[Sent]:
        yield Sent()  # torch has no fake version of its coalesced operators

    def on_a_device(
        self: DocumentAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **facts: Any
    ) -> Tensor:
        params = facts["packed_seq_params"]
        if params.context is not None:
            key, value = self._gathered(key, value, params)
        return self._masked(query, key, value, params.attention_bias(query.dtype))

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (model_build, "initialize", lambda *_, **__: None),
            (torch.nn.Module, "_apply", lambda module, *_, **__: module),
            (torch.distributed, "all_gather_object", everyone_says),
            (param_and_grad_buffer, "_coalescing_manager", one_by_one),
            (CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
            (DocumentAttention, "forward", on_a_device),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def states_of(config: Config, pg: ProcessGroupCollection) -> States:
    """The states of this rank, without a forward pass."""
    with _without_numbers(), FakeTensorMode(allow_non_fake_inputs=True):
        return _states(build(config, pg))


def one_step(config: Config, pg: ProcessGroupCollection) -> tuple[States, Collectives]:
    """The states of this rank, and its messages in forward, backward and update of all its micro-batches."""
    with _without_numbers(), FakeTensorMode(allow_non_fake_inputs=True):
        parts = build(config, pg)
        mixture = SyntheticMixture(config, share={"text": 0.5, "image": 0.5})
        own = part_of(pg).batch(mixture, 0, config.train.global_batch_size // config.train.micro_batch_size)
        batches = [to_device(content, mixture.vocabulary) for content in own]
        with Collectives() as messages:
            parts.stepper.accumulate(batches)
            for part in _optimizers(parts):
                part.prepare_grads()
            for part in _optimizers(parts):
                part.step_with_ready_grads()
        return _states(parts), messages


def _optimizers(parts: TrainingParts) -> list[Any]:
    chained = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _states(parts: TrainingParts) -> States:
    buffers = [buffer for chunk in parts.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [parameter for chunk in parts.chunks for parameter in chunk.parameters()]
    optimizers = _optimizers(parts)
    # Moments are created in the first step; before it only the copies exist that they belong to.
    shards = [tensor for part in optimizers for group in part.shard_fp32_from_float16_groups for tensor in group]
    shards += [tensor for part in optimizers for group in part.shard_fp32_groups for tensor in group]
    copies = 4 if parts.chunks[0].config.bf16 else 0
    return States(
        parameters=sum(map(_bytes, parameters)),
        gradients=sum(_bytes(buffer.grad_data) for buffer in buffers),
        optimizer=sum(shard.numel() for shard in shards) * (8 + copies),
    )
