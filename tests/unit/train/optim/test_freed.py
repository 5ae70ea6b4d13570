"""A destroyed layout leaves nothing behind: no model, no process group and none of its threads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device

SHARE = {"text": 0.5, "image": 0.5}
EXPERTS = {"kind": "moma", "experts": {"counts": {"text": 2, "image": 2}, "share": SHARE}}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"model": {"kind": "dense"}},
    "moma": {"model": EXPERTS},
    "depth": {"model": {**EXPERTS, "depth": {"every": 2, "capacity": 0.5}}},
    "joint routers": {"model": {**EXPERTS, "auxiliary": {"mode": "joint"}}},
    "untied": {"model": {"kind": "dense", "untie": ["attention", "ffn", "norms"]}},
    "bf16": {"model": EXPERTS, "precision": {"dtype": "bf16"}},
    "muon": {"model": EXPERTS, "optim": {"optimizer": "muon"}},
    "compact moments": {"model": EXPERTS, "optim": {"moments": "fp8_coat"}},
}


def configuration(settings: dict[str, Any]) -> Config:
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "seq_length": 32}
    common = {
        "vocab": {"modalities": [{"name": name, "size": 64} for name in SHARE]},
        "train": {"micro_batch_size": 1, "global_batch_size": 1},
        "precision": {"dtype": "fp32"},
    }
    return Config.model_validate({**common, **settings, "model": {**shape, **settings["model"]}})


def a_step(config: Config) -> None:
    parts = build(config, groups.initialize_layout())
    mixture = SyntheticMixture(config, share=SHARE)
    parts.stepper.train([to_device(mixture.micro_batch(0), mixture.vocabulary)], lr=1e-3)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_layout(kind: str) -> None:
    config = configuration(KINDS[kind])
    groups.start(RankEnv())
    try:
        a_step(config)  # what is made once in a process is there after the first one
        groups.destroy_layout()
        before = threads()
        a_step(config)
        assert threads() > before
        groups.destroy_layout()
        assert threads() == before
        assert not [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]
    finally:
        groups.finalize()
