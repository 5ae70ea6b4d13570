"""The models for which the plan's memory was compared with real steps: `mmscale bench footprint --cases`.

Small models that differ in what needs memory: untied weights, experts, shared ones, norms per expert,
Mixture-of-Depths, format, recompute. Their vocabularies are small, because otherwise the logits, which are easy to
predict, would dominate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmscale.config import Config

_EXPERTS = {"counts": {"text": 4, "image": 2}, "share": {"text": 0.75, "image": 0.25}}
_SHARED = {"kind": "moma", "experts": _EXPERTS | {"shared": 1}, "norm": "post_per_expert"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "mot": {"kind": "dense", "untie": ["attention", "ffn", "norms"], "experts": {"share": _EXPERTS["share"]}},
    "moma": {"kind": "moma", "experts": _EXPERTS, "norm": "post"},
    "moma_shared": _SHARED,
    "moma_depth": {"kind": "moma", "experts": _EXPERTS, "norm": "post", "depth": {"every": 2, "capacity": 0.25}},
    "moma_shared_depth": _SHARED | {"depth": {"every": 2, "capacity": 0.25}},
}
_FEED_FORWARD = {"recompute": "selective", "recompute_modules": ["mlp"]}


def case(model: str, dtype: str, recompute: str, *, width: int = 128) -> Config:
    """One of the models: 4 layers, 2 sequences of 128 tokens.

    Args:
        model: one of `MODELS`.
        dtype: precision.dtype.
        recompute: parallel.recompute; "mlp" for the feed-forward sub-layer alone; "logits" for no recompute with
            such a large vocabulary that the output layer takes most of the memory, "loss" for that with a loss in
            chunks.
        width: model.hidden_size.
    """
    shape = {
        "num_layers": 4,
        "hidden_size": width,
        "ffn_hidden_size": width * 43 // 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 128,
    }
    parallel = {"mlp": _FEED_FORWARD, "logits": {}, "loss": {"loss_chunk": 64}}.get(recompute, {"recompute": recompute})
    text = 16_384 if recompute in ("logits", "loss") else 192
    return Config.model_validate(
        {
            "vocab": {"modalities": [{"name": "text", "size": text}, {"name": "image", "size": 64}]},
            "model": shape | MODELS[model],
            "train": {"micro_batch_size": 2, "global_batch_size": 2},
            "parallel": parallel,
            "precision": {"dtype": dtype},
        }
    )


def cases() -> Iterator[tuple[str, Config]]:
    """Name and configuration of all: models x fp32 and bf16 x without recompute and with full x widths 64 and 128.

    And a loss in chunks, for which the model does not matter.
    """
    for dtype in ("fp32", "bf16"):
        yield f"dense {dtype} loss in chunks", case("dense", dtype, "loss")
    for width in (64, 128):
        for model in MODELS:
            for dtype in ("fp32", "bf16"):
                for recompute in ("none", "full"):
                    name = f"{model} {dtype} recompute={recompute} width={width}"
                    yield name, case(model, dtype, recompute, width=width)
