"""Converts a run's configuration to the config.json of a Hugging Face model.

Names and numbers only; no tensors, no files. from_hf.py converts back.
"""

from __future__ import annotations

from typing import Any

from checkpoints_tools.huggingface.weights import is_native, model_type
from mmscale.config import Config, derived
from mmscale.config.derived import shared_width
from mmscale.data.vocab import BOI, BOS, EOI, EOS, PAD, Vocabulary
from mmscale.tables.settings import ROPE_SCALINGS

# Settings of transformers' own classes besides numbers.
_NATIVE: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
}
CODE = (
    "arguments_moma.py",
    "configuration_moma.py",
    "experts_moma.py",
    "modeling_moma.py",
    "untied_moma.py",
    "versions_moma.py",
)
PROCESSOR = (
    "codecs_moma.py",
    "content_moma.py",
    "decoding_moma.py",
    "grammar_moma.py",
    "guidance_moma.py",
    "image_codes_moma.py",
    "infilling_moma.py",
    "items_moma.py",
    "likelihood_moma.py",
    "pixels_moma.py",
    "processing_moma.py",
    "versions_moma.py",
)


def model_config(
    config: Config, *, auxiliary_size: int, thresholds: bool, routing: str, tokens_per_image: int
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: the run's configuration.
        auxiliary_size: inner width of its auxiliary routers; 0: there are none.
        thresholds: it keeps averaged cut-offs.
        routing: mode by which experts are assigned to tokens (configuration_moma.py).
        tokens_per_image: tokens of an image; 0: the data has none.
    """
    model = config.model
    common = {
        "vocab_size": config.vocab.padded_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.precision.dtype],
    }
    if is_native(config):
        name = model_type(config)
        return {"model_type": name, "hidden_act": "silu", **_NATIVE[name], **common}
    if model.depth is not None:
        # Keys of depth layers have one channel more; kernels of engines have steps of 32.
        common |= {"head_dim": model.head_dim // 32 * 32 + 32, "head_width": model.head_dim}
    own = {
        "norm": model.norm,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "untie": list(model.untie),
        "no_modality_id": PAD,
        "modalities": [[n, *r] for n, r in zip(config.vocab.names, config.vocab.ranges, strict=True)],
        "expert_groups": expert_groups(config),
        "choice": model.experts.choice,
        "token_choice": token_choice(config),
        "shared_intermediate_size": shared_width(config) if model.has_experts else 0,
        "mod_layers": [layer for layer in range(model.num_layers) if model.is_depth_layer(layer)],
        "auxiliary_size": auxiliary_size,
        "keeps_thresholds": thresholds,
        "routing": routing,
        "tokens_per_image": tokens_per_image,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
    }
    auto_map = {
        "AutoConfig": "configuration_moma.MomaConfig",
        "AutoModel": "modeling_moma.MomaModel",
        "AutoModelForCausalLM": "modeling_moma.MomaForCausalLM",
        "AutoProcessor": "processing_moma.MomaProcessor",
    }
    return {"architectures": ["MomaForCausalLM"], "model_type": "moma", "auto_map": auto_map, **common, **own}


def rope_parameters(config: Config) -> dict[str, Any]:
    """The rotary position embedding, with transformers' names."""
    scaling, base = config.model.rope_scaling, {"rope_theta": config.model.rope_base}
    if scaling is None:
        return {"rope_type": "default", **base}
    given = scaling.model_dump(mode="json", exclude_none=True)
    reads = ("rope_type", "factor", *ROPE_SCALINGS[scaling.rope_type].reads)
    return {**{name: given[name] for name in reads if name in given}, **base}


def expert_groups(config: Config) -> list[dict[str, Any]]:
    """Groups of experts for configuration_moma.py; empty for a dense model."""
    ungated = derived.ungated_groups(config)
    groups = sorted(derived.expert_groups(config) + ungated, key=lambda group: group.modalities)
    return [
        {"name": group.name, "modalities": list(group.modalities), "experts": group.experts}
        | ({"ungated": True} if group in ungated else {})
        for group in groups
    ]


def token_choice(config: Config) -> dict[str, Any] | None:
    """How tokens choose experts, for configuration_moma.py; None if experts choose, or there are none."""
    chosen = config.model.experts.token_choice
    return None if chosen is None else {"scores": chosen.scores, "top_k": chosen.top_k}


def generation_config(config: Config) -> dict[str, Any]:
    """The content of generation_config.json, which names the ids that are never generated."""
    vocabulary = Vocabulary.from_config(config.vocab)
    ends, never = list(vocabulary.ends), never_generated(config)
    return {
        "_from_model_config": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "suppress_tokens": never,
    }


def never_generated(config: Config) -> list[int]:
    """Ids that follow no token of a document: some special tokens, and ids of no modality."""
    vocabulary = Vocabulary.from_config(config.vocab)
    return [*vocabulary.never_generated, *range(config.vocab.size, config.vocab.padded_size)]
