"""The settings that determine a checkpoint's tensors, compared before any tensor is read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.config import Config
from mmscale.errors import CheckpointError

WEIGHTS, TRAINING = "weights", "training"  # content of a checkpoint: `contents` of mmscale.json


def shape_of(config: Config) -> dict[str, Any]:
    """The settings that a checkpoint's tensors depend on, by dotted key."""
    model, vocab = config.model, config.vocab
    shape: dict[str, Any] = {
        f"model.{name}": getattr(model, name)
        for name in (
            "kind",
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "norm",
            "qk_norm",
            "tie_embeddings",
        )
    }
    shape["model.num_query_groups"] = model.query_groups
    shape["model.kv_channels"] = model.head_dim
    shape["model.experts.counts"] = dict(sorted(model.experts.counts.items()))
    shape["model.experts.shared"] = model.experts.shared
    shape["model.experts.shared_ffn_hidden_size"] = model.experts.shared_ffn_hidden_size
    shape["model.depth.every"] = model.depth.every if model.depth else None
    # None if there are no such tensors, as in older checkpoints.
    shape["model.qkv_bias"] = model.qkv_bias or None
    shape["model.untie"] = sorted(model.untie) or None
    shape["model.experts.ungated"] = sorted(model.experts.ungated) or None
    shape["model.auxiliary.width"] = model.auxiliary_width if model.auxiliary.mode == "joint" else None
    shape["model.experts.threshold_decay"] = "kept" if model.keeps_thresholds else None
    shape["model.experts.token_choice"] = "set" if model.experts.token_choice is not None else None
    shape["vocab.modalities"] = [[modality.name, modality.size] for modality in vocab.modalities]
    shape["vocab.pad_multiple"] = vocab.pad_multiple
    return shape


def check_shape(config: Config, saved: dict[str, Any], *, where: str) -> None:
    """Refuse a checkpoint of another model before anything is read.

    Args:
        config: this run's configuration.
        saved: result of `shape_of` when the checkpoint was written.
        where: name of the checkpoint, for the message.

    Raises:
        CheckpointError: the shapes differ; names every differing setting.
    """
    mine = shape_of(config)
    differing = [f"{key} was {saved.get(key)}, is {mine[key]}" for key in mine if saved.get(key) != mine[key]]
    if differing:
        raise CheckpointError(
            f"{where} holds another model: {'; '.join(differing)}",
            remedy="restore these settings, or start a new run with another run.name",
        )


def check_frozen(config: Config, info: Mapping[str, Any], *, where: str) -> None:
    """Refuse a checkpoint whose optimizer has state for other weights, because other ones were frozen.

    Args:
        config: this run's configuration.
        info: content of the checkpoint's mmscale.json.
        where: name of the checkpoint, for the message.

    Raises:
        CheckpointError: `optim.freeze` differs, and the checkpoint is not one of weights only.
    """
    saved = info.get("config", {}).get("optim", {}).get("freeze", [])
    if info.get("contents") == WEIGHTS or sorted(saved) == sorted(config.optim.freeze):
        return
    raise CheckpointError(
        f"{where}: optim.freeze was [{', '.join(saved)}], is [{', '.join(config.optim.freeze)}], and the optimizer's "
        "state is that of the weights which were trained",
        remedy="restore it, or begin a run from the weights alone: `mmscale convert to-hf`, then from-hf",
    )
