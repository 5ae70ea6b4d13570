"""MoMa (arXiv 2407.21770) for Hugging Face transformers 5: causal inference with auxiliary routers.

Shipped next to the weights. A row of the batch is one document; arguments_moma.py defines when packed documents are
allowed. Training's expert choice, which depends on later tokens, is not included.

Shapes: B rows, S new tokens, H hidden width, D width of a head.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments_moma import CACHE, LOSS, one_cache, refuse_mixed_documents, refuse_unknown
from .configuration_moma import MomaConfig
from .experts_moma import MomaAuxiliaryRouter, MomaDenseMLP, MomaSparseMLP
from .untied_moma import apply, untied
from .versions_moma import warn_if_untested

NO_MODALITY = -1
# Added by the key of a skipped token to every score before scaling: exp(-30000 / sqrt(D)) is 0, and fp16 can hold it.
_SKIPPED = -30000.0


class MomaAttention(nn.Module):
    """Causal attention with grouped queries; tokens that skip a Mixture-of-Depths layer are not attended to in it.

    The cached key has an additional channel with the skip flag: q' = [q, 1/scale], k' = [k, flag], flag 0 if kept,
    otherwise -30000 * scale, so that q' k' * scale = q k * scale + flag. This works with every cache class, and with
    every attention backend whose keys may be wider than values.
    """

    def __init__(self, config: MomaConfig, layer_idx: int) -> None:
        super().__init__()
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads or 0, config.head_width
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width
        self.cached_width = config.head_dim or width
        self.num_key_value_groups = heads // groups
        self.scaling = width**-0.5
        self.is_causal = True
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = untied(config, "attention", lambda: nn.Linear(hidden, heads * width, bias=bias))
        self.k_proj = untied(config, "attention", lambda: nn.Linear(hidden, groups * width, bias=bias))
        self.v_proj = untied(config, "attention", lambda: nn.Linear(hidden, groups * width, bias=bias))
        self.o_proj = untied(config, "attention", lambda: nn.Linear(heads * width, hidden, bias=False))
        self.q_norm = rms_norm(config, width) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(config, width) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        modality: torch.Tensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] and [B, S] -> [B, S, H]; keep: [B, S] bool for a Mixture-of-Depths layer, otherwise None."""
        cache = one_cache(cache, past_key_values)
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        query, key, value = (
            apply(projection, hidden_states, modality).view(shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply(self.q_norm, query, modality).transpose(1, 2)
        key = apply(self.k_norm, key, modality).transpose(1, 2)
        value = value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if keep is not None:
            flag = torch.where(keep, 0.0, _SKIPPED * self.scaling).to(key.dtype)
            key = torch.cat((key, flag[:, None, :, None].expand(-1, key.shape[1], -1, 1)), dim=-1)
            query = F.pad(query, (0, 1), value=1.0 / self.scaling)
        if self.config._attn_implementation == "vllm":  # its cache has one width for all keys and values
            query, key, value = (F.pad(one, (0, self.cached_width - one.shape[-1])) for one in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        out = out.reshape(batch, length, -1, value.shape[-1])[..., : self.head_dim]
        return apply(self.o_proj, out.reshape(batch, length, -1), modality), weights


def rms_norm(config: MomaConfig, width: int, part: str = "norms") -> nn.Module:
    """RMSNorm over the last dimension, with a weight for each modality where `part` is untied."""
    return untied(config, part, lambda: nn.RMSNorm(width, eps=config.rms_norm_eps))


class MomaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward with residual connections; some layers process only the tokens that they choose."""

    depth_threshold: torch.Tensor | None

    def __init__(self, config: MomaConfig, layer_idx: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        sparse = bool(config.expert_groups)
        self.pre = config.norm == "pre"
        self.self_attn = MomaAttention(config, layer_idx)
        self.mlp = MomaSparseMLP(config) if sparse else MomaDenseMLP(config)
        if self.pre:
            self.input_layernorm = rms_norm(config, hidden)
            self.post_attention_layernorm = rms_norm(config, hidden)
        else:
            self.attention_output_norm = rms_norm(config, hidden)
            # Normalised experts carry their own norms.
            own = sparse and config.norm == "post_per_expert"
            self.mlp_output_norm = nn.Identity() if own else rms_norm(config, hidden)
        self.is_depth_layer = layer_idx in (config.mod_layers or ())
        if self.is_depth_layer:
            self.depth_router = nn.Parameter(torch.empty(hidden))
            self.routing = config.routing
            self.depth_auxiliary = (
                MomaAuxiliaryRouter(hidden, config.auxiliary_size, 1) if config.auxiliary_size else None
            )
            self.register_buffer("depth_threshold", torch.empty(1) if config.keeps_thresholds else None)

    def forward(self, hidden_states: torch.Tensor, modality: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; modality: [B, S], -1 for padding."""
        assert modality is not None
        if not self.is_depth_layer:
            hidden_states = hidden_states + self._attention(hidden_states, modality, None, **kwargs)
            flat = hidden_states.flatten(0, 1)
            return hidden_states + self._mlp(flat, modality.flatten()).view(hidden_states.shape)
        logits = hidden_states.float() @ self.depth_router.float()
        if self.routing == "threshold":
            assert self.depth_threshold is not None
            keep = logits > self.depth_threshold.float()
        else:
            assert self.depth_auxiliary is not None
            keep = self.depth_auxiliary(hidden_states)[1].squeeze(-1)
        keep = keep & (modality != NO_MODALITY)
        gate = logits.sigmoid()
        before = hidden_states[keep]
        after = before + self._attention(hidden_states, modality, keep, **kwargs)[keep]
        after = after + self._mlp(after, modality[keep])
        delta = (gate[keep].unsqueeze(-1) * (after - before).float()).to(hidden_states.dtype)
        return hidden_states.index_put((keep,), before + delta)

    def _attention(
        self, hidden: torch.Tensor, modality: torch.Tensor, keep: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        into = apply(self.input_layernorm, hidden, modality) if self.pre else hidden
        out, _ = self.self_attn(into, modality=modality, keep=keep, **kwargs)
        return out if self.pre else apply(self.attention_output_norm, out, modality)

    def _mlp(self, tokens: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        out = self.mlp(apply(self.post_attention_layernorm, tokens, modality) if self.pre else tokens, modality)
        return out if self.pre else apply(self.mlp_output_norm, out, modality)


class MomaPreTrainedModel(PreTrainedModel):
    """Properties of all MoMa models for transformers."""

    config: MomaConfig
    config_class = MomaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomaDecoderLayer"]  # noqa: RUF012  as transformers declares it
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its kernels require keys as wide as values
    _supports_attention_backend = True
    # bf16 would move a threshold by up to 0.4 %.
    _keep_in_fp32_modules_strict = ["threshold", "depth_threshold", "router_bias"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MomaDecoderLayer, "attentions": MomaAttention}  # noqa: RUF012

    def __init__(self, *inputs: Any, **kwargs: Any) -> None:
        warn_if_untested()
        super().__init__(*inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        router = isinstance(module, MomaAuxiliaryRouter)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if "threshold" in name:
                init.constant_(tensor, 0.5 if router else 0.0)
            elif name == "router_bias":
                init.constant_(tensor, 0.0)
            elif router or (isinstance(tensor, nn.Parameter) and name != "weight"):
                init.normal_(tensor, mean=0.0, std=std)  # does not change loaded tensors


class MomaModel(MomaPreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: MomaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MomaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = rms_norm(config, config.hidden_size, part="final_norm")
        heads = copy.copy(config)
        heads.head_dim = config.head_width  # which may be narrower than that of an engine's cache
        self.rotary_emb = LlamaRotaryEmbedding(config=heads)
        self.gradient_checkpointing = False
        self.post_init()

    def modality_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Index of each id's modality, -1 for padding; ids added to the vocabulary later are text. Same shape."""
        modality = torch.zeros_like(input_ids)
        for index, (_, first, end) in enumerate(self.config.modalities or []):
            modality = torch.where((input_ids >= first) & (input_ids < end), index, modality)
        return torch.where(input_ids == self.config.no_modality_id, NO_MODALITY, modality)

    def _known_modality(
        self, input_ids: torch.Tensor | None, hidden: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S], as `modality_of`; without ids all tokens are of the first modality if no layer depends on it."""
        if input_ids is not None:
            return self.modality_of(input_ids)
        if self.config.needs_modality:
            raise ValueError(
                "this model needs input_ids or modality beside inputs_embeds: its layers depend on a token's modality, "
                "which follows from its id (`model.modality_of(input_ids)`)"
            )
        modality = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        if attention_mask is None or attention_mask.dim() != 2:
            return modality
        token = attention_mask[:, -hidden.shape[1] :].to(hidden.device, torch.bool)
        return modality.masked_fill(~token, NO_MODALITY)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        modality: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """[B, S] ids -> [B, S, H].

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], 0 for padding; or [B, 1, S, past + S], as made by transformers.
            position_ids: [B, S]; default: from the cache's length on.
            past_key_values: the cache, by its name in transformers up to 5.23.
            inputs_embeds: [B, S, H], instead of the embedding's rows. Without ids, `modality` is required too, unless
                no layer depends on it (`config.needs_modality`).
            use_cache: return a cache; default: config.use_cache.
            cache: the cache, by its name in transformers from 5.24 on.
            modality: [B, S], index of each token's modality, -1 for padding; default: that of its id.
            kwargs: see arguments_moma.py.

        Raises:
            ValueError: the modality of a token is unknown, and a layer depends on it; or packed documents would be
                mixed.
            TypeError: an argument is unknown.
        """
        refuse_unknown(kwargs, where=type(self).__name__)
        cache = one_cache(cache, past_key_values)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if modality is None:
            modality = self._known_modality(input_ids, hidden, attention_mask)
        refuse_mixed_documents(position_ids, attention_mask, cache, padding=modality == NO_MODALITY)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)  # type: ignore[assignment]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        angles = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                modality=modality,
                attention_mask=mask,
                position_embeddings=angles,
                **{CACHE: cache},
                **kwargs,
            )
        hidden = apply(self.norm, hidden, modality)  # type: ignore[arg-type]
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache if use_cache else None})


class MomaForCausalLM(MomaPreTrainedModel, GenerationMixin):
    """Next-token prediction over text and image tokens alike."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MomaConfig) -> None:
        super().__init__(config)
        self.model = MomaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The number of tokens of an expert, and of a depth layer, is known only when they are computed.
        self._can_compile_fullgraph = not (config.expert_groups or config.mod_layers)
        self.post_init()

    def prepare_inputs_for_generation(
        self, *inputs: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of a step, with the tokens' modality: later stages of a pipeline get no ids."""
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*inputs, inputs_embeds=inputs_embeds, **kwargs)
        if prepared.get("input_ids") is not None:
            prepared["modality"] = self.model.modality_of(prepared["input_ids"])
        return prepared

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        modality: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """[B, S] ids -> logits [B, S, vocabulary], and the loss of `labels` [B, S] that are not -100.

        Raises:
            ValueError: as for `MomaModel.forward`.
            TypeError: an argument is unknown.
        """
        refuse_unknown(kwargs, where=type(self).__name__, also=LOSS)
        of_loss = {name: kwargs.pop(name) for name in LOSS & kwargs.keys()}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            modality=modality,
            return_dict=True,
            **{CACHE: one_cache(cache, past_key_values)},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["MomaForCausalLM", "MomaModel", "MomaPreTrainedModel"]
