"""What a change of each setting does to a run that goes on from a checkpoint: one table over the whole schema.

Sections whose settings all have one effect are listed as a whole. What changes.py asks of a user follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from mmscale.config.schema import Config


class Effect(StrEnum):
    """What a setting decides."""

    SHAPE = "shape"  # which weights there are and what they mean; never changes: `checkpoint.shape.check_shape`
    FUNCTION = "function"  # what the same weights compute
    OBJECTIVE = "objective"  # what is minimized, or which batches are read
    DATA = "data"  # where the data is; whether it is the same is told by its content
    FREE = "free"  # how long, how fast, where and with which optimizer; noise of training; faults and logs


def _routed(config: Config) -> Effect:
    """Capacities follow from the length of a sequence."""
    return Effect.FUNCTION if config.model.routes else Effect.OBJECTIVE


def _scope(config: Config) -> Effect:
    """Only where experts choose among the tokens of a micro-batch."""
    chosen = config.model.experts.scope == "micro_batch" and config.model.kind != "dense"
    return Effect.FUNCTION if chosen else Effect.FREE


EFFECTS: Mapping[str, Effect | Callable[[Config], Effect]] = {
    "run.dir": Effect.FREE,
    "run.name": Effect.FREE,
    "run.seed": Effect.OBJECTIVE,
    "vocab": Effect.SHAPE,
    "model.kind": Effect.SHAPE,
    "model.num_layers": Effect.SHAPE,
    "model.hidden_size": Effect.SHAPE,
    "model.ffn_hidden_size": Effect.SHAPE,
    "model.num_attention_heads": Effect.SHAPE,
    "model.num_query_groups": Effect.SHAPE,
    "model.kv_channels": Effect.SHAPE,
    "model.seq_length": _routed,
    "model.norm": Effect.SHAPE,
    "model.norm_eps": Effect.FUNCTION,
    "model.qk_norm": Effect.SHAPE,
    "model.rope_base": Effect.FUNCTION,
    "model.tie_embeddings": Effect.SHAPE,
    "model.init_std": Effect.FREE,
    "model.dropout": Effect.FREE,
    "model.backend": Effect.FREE,
    "model.gradient_accumulation_fusion": Effect.FREE,
    "model.experts.counts": Effect.SHAPE,
    "model.experts.shared": Effect.SHAPE,
    "model.experts.shared_ffn_hidden_size": Effect.SHAPE,
    "model.experts.capacity": Effect.FUNCTION,
    "model.experts.capacity_factor": Effect.FUNCTION,
    "model.experts.capacity_multiple": Effect.FUNCTION,
    "model.experts.scope": Effect.FUNCTION,
    "model.experts.choice": Effect.FUNCTION,
    "model.experts.share": Effect.FUNCTION,
    "model.experts.noise": Effect.FREE,
    "model.experts.compute": Effect.FREE,
    "model.experts.fused_swiglu": Effect.FREE,
    "model.experts.cuda_graph": Effect.FREE,
    "model.experts.threshold_decay": Effect.FREE,  # whether averages are kept at all is a matter of shape
    "model.depth": Effect.SHAPE,
    "model.depth.every": Effect.SHAPE,
    "model.depth.capacity": Effect.FUNCTION,
    "model.depth.multiple": Effect.FUNCTION,
    "model.depth.choice": Effect.FUNCTION,
    "model.auxiliary": Effect.FREE,  # they never touch the main weights; a joint run's are a matter of shape
    "data.path": Effect.DATA,
    "data.blend": Effect.DATA,
    "data.validation": Effect.FREE,  # nothing is learned from it; other documents under a name are announced
    "data.balance": Effect.OBJECTIVE,
    "data.pack_window": Effect.OBJECTIVE,
    "data.deal_window": Effect.OBJECTIVE,
    "data.cache": Effect.FREE,
    "data.workers": Effect.FREE,
    "data.prepare": Effect.FREE,  # data that was prepared anew is other data, whatever was set
    "train.steps": Effect.FREE,
    "train.micro_batch_size": _scope,
    "train.global_batch_size": Effect.OBJECTIVE,
    "train.eval_every": Effect.FREE,
    "train.eval_batches": Effect.FREE,
    "train.z_loss": Effect.OBJECTIVE,
    "train.modality_weights": Effect.OBJECTIVE,
    "train.dry_run": Effect.FREE,
    "optim": Effect.FREE,
    "auxiliary": Effect.FREE,
    "parallel": Effect.FREE,
    "precision": Effect.FREE,  # rounding; slots that FP8 rounds up are announced
    "checkpoint": Effect.FREE,
    "resilience": Effect.FREE,
    "log": Effect.FREE,
}


def entry_of(key: str) -> str | None:
    """The line of the table that a dotted key falls under: its own, or that of the nearest section around it."""
    while key and key not in EFFECTS:
        key = key.rpartition(".")[0]
    return key or None


def effect_of(key: str, config: Config) -> Effect:
    """The effect of a setting in a configuration; one that this version does not know has none."""
    entry = entry_of(key)
    if entry is None:
        return Effect.FREE
    found = EFFECTS[entry]
    return found if isinstance(found, Effect) else found(config)
