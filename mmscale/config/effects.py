"""The table of effects: what a change of each setting does to a run that resumes from a checkpoint.

A section whose settings all have one effect has one line. changes.py derives from it which changes need a confirmation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from mmscale.config.schema import Config


class Effect(StrEnum):
    """What a change of a setting affects."""

    SHAPE = "shape"  # which weights exist and what they mean; it must not change (`checkpoint.shape.check_shape`)
    FUNCTION = "function"  # what the same weights compute
    OBJECTIVE = "objective"  # what is minimized, or which batches are read
    DATA = "data"  # where the data is; the data's content is compared
    FREE = "free"  # duration, speed, machine, optimizer, noise of training, faults, logs


def _routed(config: Config) -> Effect:
    """Capacities depend on the sequence length."""
    return Effect.FUNCTION if config.model.routes else Effect.OBJECTIVE


def _scope(config: Config) -> Effect:
    """The micro-batch size matters only if experts take a number of the tokens of a micro-batch."""
    chosen = config.model.experts.scope == "micro_batch" and config.model.limits_experts
    return Effect.FUNCTION if chosen else Effect.FREE


def _seed(config: Config) -> Effect:
    """With `data.seed` the order of the data does not depend on the run's seed."""
    return Effect.OBJECTIVE if config.data.seed is None else Effect.FREE


def _image_spans(config: Config) -> Effect:
    """Without masked documents there are no spans."""
    return Effect.OBJECTIVE if config.objective.cm3_rate else Effect.FREE


EFFECTS: Mapping[str, Effect | Callable[[Config], Effect]] = {
    "run.dir": Effect.FREE,
    "run.name": Effect.FREE,
    "run.seed": _seed,
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
    "model.rope_scaling": Effect.FUNCTION,
    "model.qkv_bias": Effect.SHAPE,
    "model.untie": Effect.SHAPE,
    "model.tie_embeddings": Effect.SHAPE,
    "model.init_std": Effect.FREE,
    "model.dropout": Effect.FREE,
    "model.backend": Effect.FREE,
    "model.gradient_accumulation_fusion": Effect.FREE,
    "model.experts.counts": Effect.SHAPE,
    "model.experts.ungated": Effect.SHAPE,
    "model.experts.shared": Effect.SHAPE,
    "model.experts.shared_ffn_hidden_size": Effect.SHAPE,
    "model.experts.capacity": Effect.FUNCTION,
    "model.experts.capacity_factor": Effect.FUNCTION,
    "model.experts.capacity_multiple": Effect.FUNCTION,
    "model.experts.scope": Effect.FUNCTION,
    "model.experts.choice": Effect.FUNCTION,
    "model.experts.token_choice": Effect.SHAPE,  # there are biases, or not
    "model.experts.token_choice.scores": Effect.FUNCTION,
    "model.experts.token_choice.top_k": Effect.FUNCTION,
    "model.experts.token_choice.bias_rate": Effect.FREE,
    "model.experts.token_choice.capacity_factor": Effect.OBJECTIVE,  # of training only
    "model.experts.share": Effect.FUNCTION,
    "model.experts.noise": Effect.FREE,
    "model.experts.compute": Effect.FREE,
    "model.experts.fused_swiglu": Effect.FREE,
    "model.experts.cuda_graph": Effect.FREE,
    "model.experts.threshold_decay": Effect.FREE,  # whether averages exist at all is part of the shape
    "model.depth": Effect.SHAPE,
    "model.depth.every": Effect.SHAPE,
    "model.depth.capacity": Effect.FUNCTION,
    "model.depth.multiple": Effect.FUNCTION,
    "model.depth.choice": Effect.FUNCTION,
    "model.auxiliary": Effect.FREE,  # they never change the main weights; a joint run's routers are part of the shape
    "data.path": Effect.DATA,
    "data.blend": Effect.DATA,
    "data.temperature": Effect.DATA,
    "data.validation": Effect.FREE,  # not trained on; changed documents under a name are reported
    "data.order": Effect.FREE,  # applies to new runs; a run keeps its order (`mmscale.data.stream.segments`)
    "data.selection": Effect.FREE,  # weights that come or go are part of what identifies the data
    "data.retrieval.neighbours": Effect.OBJECTIVE,
    "data.retrieval.loss": Effect.OBJECTIVE,
    "data.retrieval.evaluation": Effect.FREE,
    "data.balance": Effect.OBJECTIVE,
    "data.pack_window": Effect.OBJECTIVE,
    "data.deal_window": Effect.OBJECTIVE,
    "data.seed": Effect.OBJECTIVE,
    "data.document_multiple": Effect.OBJECTIVE,
    "data.cache": Effect.FREE,
    "data.verify": Effect.FREE,
    "data.workers": Effect.FREE,
    "data.prepare": Effect.FREE,  # data that was prepared again is other data in any case
    "train.steps": Effect.FREE,
    "train.micro_batch_size": _scope,
    "train.global_batch_size": Effect.OBJECTIVE,
    "train.eval_every": Effect.FREE,
    "train.eval_batches": Effect.FREE,
    "train.eval_sources": Effect.FREE,
    "train.tasks": Effect.FREE,
    "train.loss": Effect.OBJECTIVE,
    "train.loss_args": Effect.OBJECTIVE,
    "train.hooks": Effect.FREE,  # they may look, and change nothing
    "train.stop_when": Effect.FREE,
    "train.z_loss": Effect.OBJECTIVE,
    "train.modality_weights": Effect.OBJECTIVE,
    "train.loss_weights": Effect.OBJECTIVE,
    "train.dry_run": Effect.FREE,
    "objective.cm3_rate": Effect.OBJECTIVE,
    "objective.image_spans": _image_spans,
    "optim": Effect.FREE,
    "optim.freeze": Effect.FREE,  # the optimizer's state must fit (`checkpoint.shape.check_frozen`)
    "auxiliary": Effect.FREE,
    "sft": Effect.FREE,
    "parallel": Effect.FREE,
    "precision": Effect.FREE,  # rounding; slots that FP8 rounds up are reported
    "checkpoint": Effect.FREE,
    "resilience": Effect.FREE,
    "log": Effect.FREE,
}


def entry_of(key: str) -> str | None:
    """The line of the table for a dotted key: its own, or that of the nearest enclosing section."""
    while key and key not in EFFECTS:
        key = key.rpartition(".")[0]
    return key or None


def effect_of(key: str, config: Config) -> Effect:
    """The effect of a setting in a configuration. A setting that this version does not know is free."""
    entry = entry_of(key)
    if entry is None:
        return Effect.FREE
    found = EFFECTS[entry]
    return found if isinstance(found, Effect) else found(config)
