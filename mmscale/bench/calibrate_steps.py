"""Real optimizer steps for `mmscale bench calibrate`: small ones that it fits, others that it predicts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from mmscale.bench.step import OwnContender
from mmscale.config import Config
from mmscale.runtime import device

_EXPERTS = {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}}
_UNTIED = {"kind": "dense", "untie": ["attention", "ffn", "norms"]}
_KINDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "moe": {"kind": "moe", "experts": {"counts": {"mixed": 8}}},
    "moma": {"kind": "moma", "experts": _EXPERTS},
    "moma_depth": {"kind": "moma", "experts": _EXPERTS, "depth": {"every": 2, "capacity": 0.25}},
    "mot": _UNTIED,
}
# Kind, layers, width, tokens of a sequence, sequences of a micro-batch, ids of the vocabulary.
Shape = tuple[str, int, int, int, int, int]
FITTED: tuple[Shape, ...] = (
    ("dense", 2, 64, 128, 2, 512),
    ("dense", 4, 64, 512, 4, 512),
    ("dense", 2, 256, 256, 4, 512),
    ("dense", 2, 128, 1024, 2, 8192),
    ("dense", 1, 512, 256, 4, 1024),
    ("dense", 4, 128, 512, 4, 512),
    ("dense", 4, 64, 256, 16, 512),
    ("dense", 2, 256, 512, 4, 2048),
    ("moma", 2, 64, 128, 2, 512),
    ("moma", 2, 64, 512, 4, 512),
    ("moma", 2, 256, 256, 4, 512),
    ("moma", 1, 512, 256, 4, 4096),
    ("moma", 4, 128, 512, 4, 1024),
    ("moe", 2, 128, 512, 4, 2048),
    ("moma_depth", 4, 128, 256, 4, 512),
    ("mot", 2, 128, 512, 2, 512),
)
PREDICTED: tuple[Shape, ...] = (
    ("dense", 3, 96, 256, 4, 1024),
    ("dense", 4, 192, 512, 4, 2048),
    ("dense", 3, 384, 512, 2, 4096),
    ("dense", 6, 128, 256, 8, 1024),
    ("moe", 3, 192, 512, 4, 1024),
    ("moma", 3, 96, 320, 8, 1280),
    ("moma", 4, 192, 512, 4, 2048),
    ("moma", 3, 384, 512, 2, 4096),
    ("moma_depth", 6, 192, 512, 4, 1024),
    ("mot", 3, 256, 512, 4, 2048),
)


def config_of(shape: Shape) -> Config:
    """The configuration of a step."""
    kind, layers, width, length, batch, ids = shape
    return Config.model_validate(
        {
            "vocab": {"modalities": [{"name": "text", "size": ids // 2}, {"name": "image", "size": ids // 2}]},
            "model": _KINDS[kind]
            | {
                "num_layers": layers,
                "hidden_size": width,
                "ffn_hidden_size": -(-8 * width // (3 * 16)) * 16,
                "num_attention_heads": max(2, width // 64),
                "seq_length": length,
            },
            "train": {"micro_batch_size": batch, "global_batch_size": batch},
            "precision": {"dtype": "bf16" if device.has_cuda() else "fp32"},
        }
    )


def seconds_of_steps(configs: Sequence[Config], *, repeats: int) -> list[float]:
    """The shortest of several optimizer steps of each configuration, after two to warm up [s].

    Configurations alternate, so that a machine whose speed changes treats all of them alike.
    """
    contenders = [OwnContender(config) for config in configs]
    rounds = [[_seconds(contender, step) for contender in contenders] for step in range(repeats + 2)]
    return [min(found) for found in zip(*rounds[2:], strict=True)]


def _seconds(contender: OwnContender, step: int) -> float:
    contender.prepare(step)
    device.synchronize()
    begin = clock()
    contender.forward_backward()
    contender.update()
    device.synchronize()
    return clock() - begin


def clock() -> float:
    """Seconds of work: on a CPU its time over the threads, so that other processes of the machine do not count."""
    return time.perf_counter() if device.has_cuda() else time.process_time() / torch.get_num_threads()
