"""Exchange of tokens with their experts that travels while something else is computed.

`to_experts` of experts.py sends all groups in one message and waits. Here every group has a message of its own, which
is started and, where its tokens are needed, waited for; in backward the gradient's message is started where the forward
one was waited for. The results are the same to the last bit: messages move rows and change none.

Shapes: E experts of a group, L = E / EP of them on this rank, C slots of an expert on a rank, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def largest_everywhere(counts: Tensor, group: ProcessGroup) -> list[int]:
    """The largest of each count over the ranks that exchange tokens, on the host.

    Where routing is decided token by token, ranks need different numbers of slots. The exchange has equal splits, so
    every rank takes as many as the fullest one needs. Every rank calls it; it waits for the device.

    Args:
        counts: integers, of the same shape on all ranks [n].
        group: expert-parallel ranks.
    """
    if group.size() > 1:
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=group)
    return [int(count) for count in counts.tolist()]


class _Message:
    """An equal-split all-to-all on its way. Holds what is sent until it has been sent."""

    def __init__(self, tensor: Tensor, group: ProcessGroup) -> None:
        self.sent = tensor.contiguous()
        self.received = torch.empty_like(self.sent)
        self.work = torch.distributed.all_to_all_single(self.received, self.sent, group=group, async_op=True)

    def wait(self) -> None:
        """On CUDA the stream waits, not the host."""
        assert self.work is not None
        self.work.wait()
        del self.sent


class _Journey:
    """What the two ends of an exchange know of each other."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.there: _Message | None = None
        self.back: _Message | None = None


class _Depart(torch.autograd.Function):
    """Starts the message; its output is filled when `_Arrive` has waited. Backward: waits for the gradient's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.there = _Message(tensor, journey.group)
        return journey.there.received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        message = ctx.journey.back
        assert message is not None and message.received.data_ptr() == gradients[0].data_ptr()
        message.wait()
        ctx.journey.back = None
        return gradients[0], None


class _Arrive(torch.autograd.Function):
    """Waits for the message. Backward: starts the gradient's, and hands on where it will be."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        assert journey.there is not None
        journey.there.wait()
        journey.there = None
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.journey.back = _Message(gradients[0], ctx.journey.group)
        return ctx.journey.back.received, None


class Travelling:
    """Rows of one group on their way to other ranks. Every rank starts the same exchanges in the same order.

    Args:
        rows: [ranks, n, H] or anything with as many rows for each rank, ordered by rank.
        group: expert-parallel ranks.
    """

    def __init__(self, rows: Tensor, group: ProcessGroup) -> None:
        self._journey = _Journey(group)
        self._rows = _Depart.apply(rows, self._journey)

    def arrived(self) -> Tensor:
        """What the other ranks sent, in the same shape, ordered by rank. To be asked once."""
        return _Arrive.apply(self._rows, self._journey)


def send_to_experts(chosen: Tensor, group: ProcessGroup) -> Travelling:
    """Start sending a group's chosen tokens [E, C, H] to the ranks of their experts."""
    return Travelling(chosen, group)


def receive_as_expert(travelling: Travelling, ranks: int) -> Tensor:
    """What an expert's rank received: [L, EP * C, H], by sending rank, as from `to_experts`."""
    rows = travelling.arrived()
    experts, slots, width = rows.shape
    local = experts // ranks
    return rows.view(ranks, local, slots, width).transpose(0, 1).reshape(local, ranks * slots, width)


def send_back(outputs: Tensor, group: ProcessGroup) -> Travelling:
    """Start sending experts' outputs [L, EP * C, H] back to where their tokens came from."""
    ranks = group.size()
    local, rows, width = outputs.shape
    by_rank = outputs.view(local, ranks, rows // ranks, width).transpose(0, 1)
    return Travelling(by_rank.reshape(ranks * local, rows // ranks, width), group)
