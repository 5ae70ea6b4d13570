"""The exchange of tokens with their experts, overlapped with computation.

`to_experts` of experts.py sends all groups in one message and waits. Here every group has its own message, which is
started early; the code waits for it when the tokens are needed. In backward the roles are reversed: the gradient's
message starts where forward waited, and is waited for where forward started. The results are bit-identical, because
messages only move rows.

Shapes: E experts of a group, L of them on this rank, C slots of an expert on a rank, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.model.experts import Places, splits


def largest_everywhere(counts: Tensor, group: ProcessGroup) -> list[int]:
    """The largest value of each count over the ranks that exchange tokens, on the host.

    With routing token by token, ranks need different numbers of slots, but the exchange needs equal ones, so every rank
    uses as many as the fullest rank needs. All ranks of the group must call this; it waits for the device.

    Args:
        counts: integers, of the same shape on all ranks [n].
        group: expert-parallel ranks.
    """
    if group.size() > 1:
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=group)
    return [int(count) for count in counts.tolist()]


class _Message:
    """An all-to-all of rows in progress. It keeps a reference to the data that it sends until they have been sent."""

    def __init__(self, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> None:
        self.sent = rows.contiguous()
        self.received = rows.new_empty(sum(receive_counts), rows.shape[1])
        self.work = torch.distributed.all_to_all_single(
            self.received, self.sent, receive_counts, send_counts, group=group, async_op=True
        )

    def wait(self) -> None:
        """Wait for the message. With CUDA the stream waits, not the host."""
        assert self.work is not None
        self.work.wait()
        del self.sent


class _Exchange:
    """Data shared by the start and the end of one exchange.

    Attributes:
        send_counts, receive_counts: numbers of rows that are sent to, and received from, every rank.
        outgoing, incoming_gradient: messages that nothing has waited for yet.
    """

    def __init__(self, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> None:
        self.send_counts, self.receive_counts = send_counts, receive_counts
        self.group = group
        self.outgoing: _Message | None = None
        self.incoming_gradient: _Message | None = None


class _StartExchange(torch.autograd.Function):
    """Starts the message; its output is filled when `_FinishExchange` has waited.

    Backward: waits for the gradient's message.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.outgoing = _Message(tensor, exchange.send_counts, exchange.receive_counts, exchange.group)
        return exchange.outgoing.received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        message = ctx.exchange.incoming_gradient
        # The gradient is the tensor that `_FinishExchange` returned; autograd added nothing to it. The true gradient is
        # still in the message.
        assert message is not None and message.sent.data_ptr() == gradients[0].data_ptr()
        message.wait()
        ctx.exchange.incoming_gradient = None
        return message.received, None


class _FinishExchange(torch.autograd.Function):
    """Waits for the message. Backward: starts the gradient's message."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        assert exchange.outgoing is not None
        exchange.outgoing.wait()
        exchange.outgoing = None
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.incoming_gradient = _Message(
            gradients[0], ctx.exchange.receive_counts, ctx.exchange.send_counts, ctx.exchange.group
        )
        # A tensor of the shape that autograd expects; `_StartExchange` reads the gradient from the message.
        return ctx.exchange.incoming_gradient.sent, None


class PendingExchange:
    """The rows of one group while they are sent to other ranks. Every rank starts the same exchanges in the same order.

    Args:
        rows: [n, H], ordered by the rank that they go to.
        send_counts: numbers of rows sent to every rank.
        receive_counts: numbers of rows received from every rank.
        group: expert-parallel ranks.
    """

    def __init__(self, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> None:
        self._exchange = _Exchange(send_counts, receive_counts, group)
        self._rows = _StartExchange.apply(rows, self._exchange)

    def arrived(self) -> Tensor:
        """The rows from the other ranks, [m, H], ordered by the sending rank. Call it once."""
        return _FinishExchange.apply(self._rows, self._exchange)


def send_to_experts(chosen: Tensor, places: Places, group: ProcessGroup) -> PendingExchange:
    """Start sending a group's chosen tokens [E, C, H] to the ranks of their experts."""
    send_counts, receive_counts = splits([chosen.shape[1]], [places], rank=group.rank())
    return PendingExchange(chosen.reshape(-1, chosen.shape[2]), send_counts, receive_counts, group)


def receive_as_expert(pending: PendingExchange, places: Places, group: ProcessGroup) -> Tensor:
    """The tokens that this rank's experts received: [L, EP * C, H], by sending rank, as from `to_experts`."""
    rows = pending.arrived()
    ranks, local, width = group.size(), len(places[group.rank()]), rows.shape[1]
    slots = rows.shape[0] // max(1, ranks * local)
    return rows.view(ranks, local, slots, width).transpose(0, 1).reshape(local, ranks * slots, width)


def send_back(outputs: Tensor, places: Places, slots: int, group: ProcessGroup) -> PendingExchange:
    """Start sending experts' outputs [L, EP * C, H] back to the ranks that the tokens came from.

    Args:
        outputs: of this rank's experts; empty if it has no expert of the group.
        places: experts of every rank.
        slots: C.
        group: expert-parallel ranks.
    """
    ranks, local, width = group.size(), len(places[group.rank()]), outputs.shape[2]
    by_rank = outputs.view(local, ranks, slots if local else 0, width).transpose(0, 1)
    send_counts, receive_counts = splits([slots], [places], rank=group.rank())
    return PendingExchange(by_rank.reshape(-1, width), receive_counts, send_counts, group)
