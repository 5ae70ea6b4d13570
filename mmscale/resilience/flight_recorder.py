# torch's flight recorder: which collectives this process has entered lately, by process group, for NCCL and gloo.
# It is on where TORCH_FR_BUFFER_SIZE is set before groups are made (launch/ranks.py sets it); it costs no collective.
"""The flight recorder, read from within the process: a rank that hangs cannot be asked from outside."""

from __future__ import annotations

import json

from torch._C import _distributed_c10d


def dump() -> str | None:
    """Torch's record of the last collectives of this process as JSON; None if it records none.

    Private functions of torch, which has no public ones: what is missing in another version is left out.
    """
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the first one in builds with CUDA
        function = getattr(_distributed_c10d, name, None)
        text = function(True, False).decode() if function is not None else ""
        if text and json.loads(text).get("entries"):
            return str(text)
    return None
