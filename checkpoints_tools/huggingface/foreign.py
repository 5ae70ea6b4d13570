"""Imports dense Qwen3, Qwen2 and Llama models as a starting point: configuration, vocabulary, tokenizer.

Ids are moved up by five for the special tokens, which take over the rows of the model's own special tokens if it has
them; image tokens come after the text. New rows are drawn around the mean of the existing ones. This module computes;
from_hf.py handles files.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.huggingface.files import WeightsByName
from checkpoints_tools.huggingface.weights import Move, moves
from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.data.modalities.text_tokens import FILE, TextTokenizer
from mmscale.data.vocab import BOS, EOS, PAD, SPECIAL_TOKENS
from mmscale.errors import CheckpointError, ConfigError, DataError
from mmscale.tables.settings import ROPE_SCALINGS

# Settings of the model by model_type.
KINDS: dict[str, dict[str, bool]] = {
    "qwen3": {"qk_norm": True, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False, "qkv_bias": False},
}
_NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_LONGEST = 4096  # default limit of the tokens of a training sequence
# Spread of new rows around the mean, relative to that of the existing rows. With 0 all image tokens would start as the
# same token, with 1 as random words.
_SPREAD = 0.1


_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}  # transformers' defaults


def translate(
    content: dict[str, Any], files: WeightsByName, *, image_codes: int, seq_length: int | None
) -> tuple[Config, list[Move]]:
    """Configuration of the run and conversions of the tensors.

    Args:
        content: config.json.
        files: the model's weights.
        image_codes: ids of image tokens; 0: none.
        seq_length: tokens of a training sequence; None: the model's context, at most 4096.

    Raises:
        CheckpointError: it is of another kind, or has a feature that mmscale's dense model lacks.
    """
    refuse_others(content)
    number = {key: content[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    rows = content["vocab_size"]
    text = len(SPECIAL_TOKENS) + rows
    modalities = [{"name": "text", "size": text}]
    modalities += [{"name": "image", "size": image_codes}] if image_codes else []
    rope = _rope(content)
    base = rope.get("rope_theta") or content.get("rope_theta") or 10_000.0
    context = content.get("max_position_embeddings") or _LONGEST
    embedding = files.dtype("model.embed_tokens.weight")
    try:
        config = resolve(
            {
                "vocab": {"modalities": modalities},
                "model": {
                    "kind": "dense",
                    "num_layers": number["num_hidden_layers"],
                    "hidden_size": number["hidden_size"],
                    "ffn_hidden_size": content["intermediate_size"],
                    "num_attention_heads": number["num_attention_heads"],
                    "num_query_groups": content.get("num_key_value_heads") or number["num_attention_heads"],
                    "kv_channels": content.get("head_dim") or number["hidden_size"] // number["num_attention_heads"],
                    "seq_length": min(seq_length or min(context, _LONGEST), context),
                    "norm": "pre",
                    "norm_eps": content.get("rms_norm_eps", 1e-6),
                    **KINDS[content["model_type"]],
                    "rope_base": base,
                    "rope_scaling": _scaling(rope),
                    "tie_embeddings": bool(content.get("tie_word_embeddings", False)),
                },
                "precision": {"dtype": "bf16" if embedding == torch.bfloat16 else "fp32"},
            }
        )
    except ConfigError as error:
        raise CheckpointError(
            f"the model's config.json asks for what mmscale's dense model cannot do: {error.cause}",
            remedy="choose another model",
        ) from None
    special = {BOS: _id(content.get("bos_token_id")), EOS: _id(content.get("eos_token_id"))}
    special[PAD] = _id(content.get("pad_token_id"))
    grow = _Vocabulary(rows, config, special)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    listed = []
    for move in moves(config, auxiliary=False, thresholds=False):
        vocabulary = move.targets[0] in ("model.embed_tokens.weight", "lm_head.weight")
        listed.append(grow.move(move, dtype) if vocabulary else _cast(move, dtype))
    return config, listed


def refuse_others(content: dict[str, Any]) -> None:
    """Refuse settings with which mmscale's model would compute something else, and values that are not numbers.

    Args:
        content: config.json.

    Raises:
        CheckpointError: names the first setting that does not fit.
    """
    kind = content.get("model_type")
    remedy = "choose a dense Qwen3, Qwen2 or Llama model, or one that `mmscale convert to-hf` wrote"
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"a model of type {kind!r} cannot be imported", remedy=remedy)
    rope_type = _rope_type(_rope(content))
    odd = [
        ("hidden_act", content.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(content.get("attention_bias", False)), False),
        ("mlp_bias", bool(content.get("mlp_bias", False)), False),
        ("use_sliding_window", bool(content.get("use_sliding_window", False)), False),
        ("rope_type", rope_type, rope_type if rope_type in ROPE_SCALINGS else "default"),
    ]
    for name, value, wanted in odd:
        if value != wanted:
            raise CheckpointError(
                f"the model's {name} is {value!r}, mmscale's dense model has {wanted!r}", remedy=remedy
            )
    wanted = (*_NUMBERS, *(name for name in _OPTIONAL if content.get(name) is not None))
    wrong = [name for name in wanted if type(content.get(name)) is not int or content[name] < 1]
    if wrong:
        raise CheckpointError(f"config.json has no whole number above 0 for {', '.join(wrong)}", remedy=remedy)


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    found = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"the model's rope_parameters are {found!r}", remedy="copy config.json again")
    return found


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """`model.rope_scaling`.

    Numbers without a default in transformers must be given, because our defaults may differ.
    """
    kind = _rope_type(rope)
    if kind == "default":
        return None
    reads = ("factor", *ROPE_SCALINGS[kind].reads)
    if missing := [name for name in reads if rope.get(name) is None and name not in _YARN]:
        raise CheckpointError(
            f"the model's rope_parameters lack {', '.join(missing)}", remedy="copy config.json again, or complete it"
        )
    found = {name: rope[name] for name in reads if rope.get(name) is not None}
    if kind == "yarn":
        found = {**_YARN, "attention_factor": _attention_factor(rope), **found}
    return {"rope_type": kind, **found}


def _attention_factor(rope: dict[str, Any]) -> float | None:
    """The factor that follows from `mscale` and `mscale_all_dim`, which are used if both are given and not 0."""
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (over and under):
        return None
    if wrong := [name for name in ("factor", "mscale", "mscale_all_dim") if not isinstance(rope[name], float | int)]:
        raise CheckpointError(
            f"the model's rope_parameters have no number for {', '.join(wrong)}", remedy="copy config.json again"
        )
    grows = 0.1 * math.log(max(1.0, rope["factor"]))
    return float((grows * over + 1.0) / (grows * under + 1.0))


def _id(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and value >= 0 else None


def _cast(move: Move, dtype: torch.dtype) -> Move:
    return Move(move.source, move.targets, move.split, lambda parts: move.join(parts).to(dtype))


class _Vocabulary:
    """Rows of the embedding and of the output layer for the enlarged vocabulary."""

    def __init__(self, rows: int, config: Config, special: dict[int, int | None]) -> None:
        self.rows, self.config, self.special = rows, config, special

    def move(self, move: Move, dtype: torch.dtype) -> Move:
        def join(parts: Any) -> Tensor:
            return self.grown(parts[0], name=move.source, dtype=dtype)

        def split(whole: Tensor) -> list[Tensor]:
            return [whole[len(SPECIAL_TOKENS) : len(SPECIAL_TOKENS) + self.rows]]

        return Move(move.source, move.targets, split, join)

    def grown(self, known: Tensor, *, name: str, dtype: torch.dtype) -> Tensor:
        """[rows, H] -> [padded vocabulary, H]."""
        total, shift = self.config.vocab.padded_size, len(SPECIAL_TOKENS)
        if known.device.type == "meta":
            return torch.empty(total, known.shape[1], dtype=dtype, device="meta")
        exact = known.float()
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(total, known.shape[1], generator=generator)
        whole = whole.mul_(_SPREAD * exact.std(dim=0)).add_(exact.mean(dim=0))
        whole[shift : shift + self.rows] = exact
        for own, theirs in self.special.items():
            if theirs is not None and theirs < self.rows:
                whole[own] = exact[theirs]
        return whole.to(dtype)


def read_tokenizer(folder: Path, config: Config) -> TextTokenizer:
    """The model's tokenizer with the special tokens in front, for `data.prepare.text.load`.

    Raises:
        CheckpointError: the folder has no tokenizer.json, or one that cannot be used.
    """
    try:
        return TextTokenizer.load(folder / FILE, size=config.vocab.modalities[0].size)
    except DataError as error:
        raise CheckpointError(error.cause, remedy="put the model's tokenizer.json into the folder") from None
