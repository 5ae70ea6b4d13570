"""Reads torch's flight recorder within the process, because a hanging rank cannot be queried from outside.

torch's flight recorder: the recent collectives of this process, by process group, for NCCL and gloo. It is active if
TORCH_FR_BUFFER_SIZE is set before groups are created (launch/rank_command.py). Reading it needs no collective.
"""

from __future__ import annotations

from torch._C import _distributed_c10d

from mmscale import bounded


def dump() -> str | None:
    """Torch's record of the last collectives of this process as JSON; None if there is none.

    Uses private functions of torch, because there are no public ones; functions missing in another version are skipped.
    """
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the first one in builds with CUDA
        function = getattr(_distributed_c10d, name, None)
        text = function(True, False).decode() if function is not None else ""
        if text and bounded.parse_json(text).get("entries"):
            return str(text)
    return None
