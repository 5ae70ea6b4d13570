"""A run's configuration as the config.json of a Hugging Face model.

Names and numbers only; no tensors, no files. The way back is from_hf.py's.
"""

from __future__ import annotations

from typing import Any

from checkpoints_tools.hf_weights import is_native
from mmscale.config import Config
from mmscale.config.derived import shared_width
from mmscale.data.vocab import BOI, BOS, EOI, EOS, PAD

CODE = ("arguments_moma.py", "configuration_moma.py", "experts_moma.py", "modeling_moma.py", "versions_moma.py")
PROCESSOR = ("image_codes_moma.py", "pixels_moma.py", "processing_moma.py", "versions_moma.py")


def model_config(
    config: Config, *, auxiliary_size: int, thresholds: bool, routing: str, tokens_per_image: int
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: the run's configuration.
        auxiliary_size: inner width of its auxiliary routers; 0: there are none.
        thresholds: it keeps averaged cut-offs.
        routing: who decides which experts take a token (configuration_moma.py).
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
        # build.py gives megatron-core whole bases only
        "rope_parameters": {"rope_type": "default", "rope_theta": float(int(model.rope_base))},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.precision.dtype],
    }
    if is_native(config):
        name = "qwen3" if model.qk_norm else "llama"
        bias = {"attention_bias": False} if model.qk_norm else {"attention_bias": False, "mlp_bias": False}
        classes = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
        return {"architectures": [classes[name]], "model_type": name, "hidden_act": "silu", **bias, **common}
    own = {
        "norm": model.norm,
        "qk_norm": model.qk_norm,
        "no_modality_id": PAD,
        "modalities": [[n, *r] for n, r in zip(config.vocab.names, config.vocab.ranges, strict=True)],
        "expert_groups": expert_groups(config),
        "choice": model.experts.choice,
        "shared_intermediate_size": shared_width(config) if model.kind != "dense" else 0,
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


def expert_groups(config: Config) -> list[dict[str, Any]]:
    """Groups of experts as configuration_moma.py wants them; none in a dense model."""
    names, counts = config.vocab.names, config.model.experts.counts
    if config.model.kind == "dense":
        return []
    if config.model.kind == "moe":
        every = list(range(len(names)))
        return [{"name": name, "modalities": every, "experts": count} for name, count in counts.items()]
    return [{"name": name, "modalities": [index], "experts": counts[name]} for index, name in enumerate(names)]


def generation_config(config: Config) -> dict[str, Any]:
    """The content of generation_config.json: ids that no modality has are never generated."""
    unused = list(range(config.vocab.size, config.vocab.padded_size))
    return {
        "_from_model_config": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "max_length": config.model.seq_length,
        **({"suppress_tokens": unused} if unused else {}),
    }
