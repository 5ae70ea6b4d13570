"""Small models and helpers of the layout tests: reference traces of one process, made once per test session."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.trial import Trace, take_steps
from mmscale.train.proof.verify_layout import choices_of, compare, compare_tensors, counted, tolerance_of, verdict
from tests.support import run_ranks

STEPS = 3
# The required tolerance; observed differences are below 1e-6.
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 2e-6

_EXPERTS = {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "dense_tied": {
        "kind": "dense",
        "tie_embeddings": True,
        "qk_norm": False,
        "qkv_bias": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "moe": {"kind": "moe", "experts": {"counts": {"mixed": 8}, "scope": "micro_batch"}},
    "moma": {"kind": "moma", "experts": _EXPERTS, "num_query_groups": 2},
    "moma_7t1i": {
        "kind": "moma",
        "experts": {
            "counts": {"text": 7, "image": 1},
            "share": {"text": 0.7, "image": 0.3},
            "shared": 1,
            "threshold_decay": 0.9,
        },
        "auxiliary": {"mode": "joint"},
    },
    "moma_post": {"kind": "moma", "experts": _EXPERTS, "norm": "post"},
    "moma_post_per_expert_shared": {
        "kind": "moma",
        "experts": {**_EXPERTS, "shared": 1, "noise": "gumbel"},
        "norm": "post_per_expert",
    },
    "moma_depth": {"kind": "moma", "experts": _EXPERTS, "depth": {"every": 2, "capacity": 0.25, "multiple": 8}},
    "moma_competitive": {
        "kind": "moma",
        "experts": {**_EXPERTS, "choice": "competitive", "noise": "gumbel", "threshold_decay": 0.9},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "moe_softmax": {"kind": "moe", "experts": {"counts": {"mixed": 8}, "choice": "softmax"}},
    "moma_token_choice": {
        "kind": "moma",
        "experts": {**_EXPERTS, "token_choice": {"top_k": 2, "bias_rate": 0.02}},
        "num_query_groups": 2,
    },
    "moe_token_choice": {
        "kind": "moe",
        "experts": {
            "counts": {"mixed": 8},
            "scope": "micro_batch",
            "shared": 1,
            "token_choice": {"scores": "softmax", "top_k": 2, "bias_rate": 0.02, "capacity_factor": 1.0},
        },
        "norm": "post",
    },
    "moma_token_choice_depth": {
        "kind": "moma",
        "untie": ["attention", "norms"],
        "norm": "post_per_expert",
        "experts": {
            **_EXPERTS,
            "shared": 1,
            "threshold_decay": 0.9,
            "token_choice": {"bias_rate": 0.02, "capacity_factor": 1.25},
        },
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "moma_actual": {
        "kind": "moma",
        "experts": {**_EXPERTS, "capacity": "actual", "threshold_decay": 0.9, "shared": 1},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "moma_actual_micro_batch": {
        "kind": "moma",
        "experts": {**_EXPERTS, "capacity": "actual", "scope": "micro_batch", "capacity_factor": 1.3},
        "norm": "post",
    },
    "moma_one_kv_head": {"kind": "moma", "experts": _EXPERTS, "num_query_groups": 1, "qkv_bias": True},
    "moma_five_layers": {
        "kind": "moma",
        "num_layers": 5,
        "experts": _EXPERTS,
        "depth": {"every": 2, "capacity": 0.25, "multiple": 8},
    },
    "dense_depth_first": {"kind": "dense", "depth": {"every": 4, "capacity": 0.5, "multiple": 8}},
    "moma_depth_joint": {
        "kind": "moma",
        "experts": {**_EXPERTS, "threshold_decay": 0.9},
        "depth": {"every": 2, "capacity": 0.25, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "mot": {"kind": "dense", "untie": ["attention", "ffn", "norms", "final_norm"], "num_query_groups": 2},
    "mot_post_depth": {
        "kind": "dense",
        "untie": ["attention", "ffn", "norms"],
        "norm": "post",
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
    },
    "mot_frozen": {"kind": "dense", "untie": ["attention", "ffn", "norms", "final_norm"], "num_query_groups": 2},
    "moma_frozen": {
        "kind": "moma",
        "untie": ["attention", "norms"],
        "experts": {**_EXPERTS, "token_choice": {"top_k": 2, "bias_rate": 0.02}},
    },
    "moma_untied": {
        "kind": "moma",
        "untie": ["attention", "norms"],
        "experts": {**_EXPERTS, "threshold_decay": 0.9},
        "depth": {"every": 2, "capacity": 0.25, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "mot_4t1i": {
        "kind": "moma",
        "untie": ["attention", "norms"],
        "num_query_groups": 2,
        "experts": {
            "counts": {"text": 4, "image": 1},
            "ungated": ["image"],
            "share": {"text": 0.5, "image": 0.5},
            "shared": 1,
            "threshold_decay": 0.9,
        },
        "auxiliary": {"mode": "joint"},
    },
    "moma_4t1i": {
        "kind": "moma",
        "experts": {"counts": {"text": 4, "image": 1}, "ungated": ["image"], "share": {"text": 0.5, "image": 0.5}},
    },
    "mot_4t1i_depth": {
        "kind": "moma",
        "norm": "post_per_expert",
        "untie": ["attention", "norms"],
        "experts": {
            "counts": {"text": 4, "image": 1},
            "ungated": ["image"],
            "share": {"text": 0.6, "image": 0.4},
            "threshold_decay": 0.9,
        },
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8, "choice": "per_modality"},
        "auxiliary": {"mode": "joint"},
    },
    "mot_4t1i_token_choice": {
        "kind": "moma",
        "untie": ["attention", "norms"],
        "norm": "post",
        "experts": {
            "counts": {"text": 4, "image": 1},
            "ungated": ["image"],
            "share": {"text": 0.5, "image": 0.5},
            "token_choice": {"top_k": 2, "bias_rate": 0.02},
        },
    },
    "moma_joint": {
        "kind": "moma",
        "experts": {**_EXPERTS, "threshold_decay": 0.9},
        "auxiliary": {"mode": "joint"},
    },
    "dense_depth_joint": {
        "kind": "dense",
        "experts": {"threshold_decay": 0.9},
        "depth": {"every": 2, "capacity": 0.25, "multiple": 8},
        "auxiliary": {"mode": "joint"},
    },
    "moma_depth_per_modality": {
        "kind": "moma",
        "experts": {"counts": {"text": 4, "image": 2}, "share": {"text": 0.6, "image": 0.4}, "scope": "micro_batch"},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8, "choice": "per_modality"},
    },
}


# `optim.freeze` of models.
FREEZE: dict[str, list[str]] = {
    "mot_frozen": ["text"],
    "moma_frozen": ["text.experts", "image.attention"],
    "mot_4t1i_token_choice": ["image.ffn"],
}


def config(
    model: str,
    *,
    dtype: str = "fp32",
    parallel: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    reserved: bool = False,
    objective: Mapping[str, Any] | None = None,
    **train: Any,
) -> Config:
    """A model of 4 layers that trains in milliseconds; with reserved ids, on answers only."""
    shape = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
    }
    return Config.model_validate(
        {
            "vocab": {
                "modalities": [{"name": "text", "size": 64}, {"name": "image", "size": 64}],
                "reserved": reserved,
            },
            "model": {**shape, **MODELS[model]},
            "train": {"micro_batch_size": 2, "global_batch_size": 8, **train},
            # With 3e-3, fp32 rounding grows threefold per step in post-norm models: 4e-8, 2e-7, 8e-7, 4e-6 for DP2.
            "optim": {"lr": 1e-3, "eps": 1e-5, "freeze": FREEZE.get(model, []), **(optim or {})},
            "parallel": dict(parallel or {}),
            "data": dict(data or {}),
            "objective": dict(objective or {}),
            "precision": {"dtype": dtype},
        }
    )


def trace(settings: Config, env: RankEnv, *, steps: int = STEPS, **options: Any) -> Trace:
    """Steps under the settings' layout, with process groups created and destroyed around them.

    Options: `take_steps`.
    """
    parallel = settings.parallel
    groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=settings.run.seed
    )
    try:
        return take_steps(settings, steps=steps, **options)
    finally:
        groups.destroy_layout()


class References:
    """Results of one process, by model and missing modality: a trace, and a checkpoint after the first step.

    Each is made in a forked rank when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, settings: Config, *, absent: str | None = None) -> Path:
        """The folder of the checkpoint of one process."""
        return self.folder / hash_of(_alone(settings), absent)

    def get(self, settings: Config, *, absent: str | None = None) -> Trace:
        """The trace of one process without any parallelism."""
        alone, folder = _alone(settings), self.checkpoint(settings, absent=absent)
        file = folder.with_suffix(".json")
        if not file.exists():

            def make(ranks: RankEnv) -> None:
                start(ranks)
                choices = choices_of(alone, folder, repeat=False)
                found = trace(alone, ranks, absent=absent, saved=folder, choices=choices)
                if choices is not None:
                    choices.save()
                groups.finalize()
                file.write_text(json.dumps([found.losses, found.grad_norms]))

            run_ranks(make, world_size=1)
        losses, norms = json.loads(file.read_text())
        return Trace(tuple(losses), tuple(norms))


def start(ranks: RankEnv) -> None:
    """torch.distributed, without garbage collection of inherited objects: megatron-core collects in every save."""
    gc.freeze()
    groups.start(ranks)


def _alone(settings: Config) -> Config:
    return settings.model_copy(update={"parallel": Config.model_fields["parallel"].default})


def hash_of(settings: Config, absent: str | None) -> str:
    """Name of a reference's file."""
    import hashlib

    return hashlib.sha256(f"{settings.model_dump_json()}{absent}".encode()).hexdigest()[:16]


def judge(
    references: References,
    settings: Config,
    env: RankEnv,
    folder: Path,
    *,
    absent: str | None = None,
    alter: Callable[[list[Any]], None] | None = None,
) -> dict[str, Any]:
    """The result of `mmscale verify-layout` for a layout, on every rank. The reference must exist.

    Args:
        references: results of one process.
        settings: the layout.
        env: this rank.
        folder: a new one for the layout's checkpoint.
        absent: modality that is missing in odd micro-batches.
        alter: changes the model's chunks before they are wrapped.
    """
    reference, saved = references.get(settings, absent=absent), references.checkpoint(settings, absent=absent)
    choices = choices_of(settings, saved, repeat=True)
    found = trace(settings, env, absent=absent, alter=alter, saved=folder, reference=saved, choices=choices)
    tensors = groups.from_first(
        compare_tensors(saved, folder, tolerance=tolerance_of(settings)) if env.rank == 0 else None
    )
    return verdict(settings, reference=reference, trace=found, tensors=tensors, choices=counted(choices))


def assert_passes(found: dict[str, Any], label: str) -> None:
    """The layout equals one process according to the result, and something was compared."""
    assert found["passed"], (label, found)
    assert found["gradients"]["compared"] > 10 and found["state"]["compared"] > 20, (label, found)


def assert_equal(reference: Trace, found: Trace, label: str) -> None:
    """Loss and gradient norm of every step agree with one process."""
    loss, norm = compare(reference, found)
    assert loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE, (
        f"{label}: loss differs by {loss:.2e}, gradient norm by {norm:.2e}\n{reference}\n{found}"
    )
