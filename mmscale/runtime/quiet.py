"""Silences the known warnings of megatron-core 0.16.1 and torch: a dozen lines at every start, on every rank.

Warnings of libraries that a user cannot avoid, each with the reason why it is harmless. All other warnings are shown.
No logger and no error is silenced; MMSCALE_DEBUG=1 and `python -W ...` show everything.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class IgnoredWarning:
    """A warning that is not shown.

    Attributes:
        message: regular expression that its text starts with.
        why: why it is harmless.
        category: its class.
        on_gpus: whether it is harmless on machines with GPUs too.
    """

    message: str
    why: str
    category: type[Warning] = UserWarning
    on_gpus: bool = True


IGNORED = (
    IgnoredWarning(
        r"(Transformer Engine and Apex are|Apex is) not installed",
        "Both are optional, and `mmscale doctor` says once what is there. On import, from six files.",
    ),
    IgnoredWarning(
        r"moe_ffn_hidden_size is not set, using ffn_hidden_size",
        "Our experts are as wide as the dense FFN (model.ffn_hidden_size), which is what it falls back to.",
    ),
    IgnoredWarning(
        r"full scope is deprecated\. Use empty cuda_graph_scope",
        "megatron-core's own default, rejected by megatron-core; no CUDA graphs are captured.",
    ),
    IgnoredWarning(
        r"The \.grad attribute of a Tensor that is not a leaf",
        "The distributed optimizer asks its fp32 shards, which are views, for gradients that it sets itself.",
    ),
    IgnoredWarning(
        r"If you are using transformer_engine as the transformer implementation",
        "A hint about parallel.recompute=selective, which is asked for by name.",
    ),
    IgnoredWarning(
        r"When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE",
        "Without GPUs there are no such connections; with them it is worth reading.",
        on_gpus=False,
    ),
    IgnoredWarning(
        r"`load_state_dict` is deprecated and will be removed",
        "How megatron-core's dist_checkpointing reads; torch's new name does the same.",
        category=FutureWarning,
    ),
    IgnoredWarning(
        r"`torch\.distributed\.\w+` is deprecated\. Please use",
        "New names in torch for collectives that megatron-core calls by the old ones, which do the same.",
        category=FutureWarning,
    ),
)


def install() -> None:
    """Hide the known warnings from now on. Call it before megatron-core is imported, which warns on import."""
    if sys.warnoptions or os.environ.get("MMSCALE_DEBUG") == "1":
        return
    gpus = Path("/dev/nvidiactl").exists()  # without importing torch
    for known in IGNORED:
        if known.on_gpus or not gpus:
            warnings.filterwarnings("ignore", message=known.message, category=known.category)
