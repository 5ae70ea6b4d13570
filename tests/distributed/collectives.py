"""Counts a rank's messages: calls and bytes of collectives and sends by operation, with the names of mmscale.plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Key = tuple[str, int]
# c10d's operators, with their names in the plan and the argument that is the whole tensor.
_OPERATIONS = {
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


class Collectives(TorchDispatchMode):
    """Counts messages inside a `with` block; an unknown operator is an error.

    Not counted: messages in groups of one rank, and receives, because the message is the sender's.

    Attributes:
        calls, payload: calls and bytes of whole tensors, by (operation, ranks of the group). A send is between two
            ranks, in whatever group: with two stages megatron-core sends one direction through the group of all ranks
            (p2p_communication.py).
    """

    def __init__(self, *, above: int = 0) -> None:
        """Count messages of more than `above` bytes."""
        super().__init__()
        self.above = above
        self.calls: Counter[Key] = Counter()
        self.payload: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            operation, place = _OPERATIONS[func.overloadpacket.__name__]
            whole = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            size = sum(tensor.numel() * tensor.element_size() for tensor in whole)
            key = operation, 2 if operation == "send" else _ranks(args)
            if size > self.above and key[1] > 1 and operation != "receive":
                self.calls[key] += 1
                self.payload[key] += size
        return func(*args, **(kwargs or {}))


def _ranks(arguments: tuple[Any, ...]) -> int:
    (group,) = (
        torch.distributed.ProcessGroup.unbox(argument)
        for argument in arguments
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    )
    return int(group.size())
