"""Settings of the architecture (`model`). Values computed from them are in derived.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.auxiliary.schema import AuxiliaryRoutersConfig
from mmscale.config.experts.schema import ExpertsConfig
from mmscale.config.section import AtLeastOne, Count, Epsilon, Fraction, OneOf, Positive, Section, Share, setting
from mmscale.tables.settings import KINDS, NORMS, ROPE_SCALINGS, UNTIED, NormPlacement

MOST_LAYERS = 10_000


class DepthConfig(Section):
    """Mixture-of-Depths: some layers process only their highest scored tokens (MoMa 2.3; arXiv 2404.02258)."""

    every: Count = setting("Every n-th layer, starting with layer 0, is a Mixture-of-Depths layer.", 2, unit="layers")
    capacity: Fraction = setting("Fraction of each sequence's tokens that the layer processes.", 0.25)
    multiple: Count = setting(
        "Selected tokens per sequence are rounded up to a multiple of this; TP must divide it.", 8, unit="tokens"
    )
    choice: Literal["mixed", "per_modality"] = setting(
        "How the layer selects tokens. mixed: the best tokens of any modality; experts get nominal counts scaled by "
        "the capacity, and empty slots are masked; per_modality: each modality keeps its nominal share, so experts "
        "stay full.",
        "mixed",
    )


class RopeScalingConfig(Section):
    """Scaled rotary position embeddings, for sequences longer than those the model was first trained with."""

    rope_type: Annotated[str, OneOf(ROPE_SCALINGS)] = setting(
        f"The rule, by transformers' name. {ROPE_SCALINGS.help}", "llama3"
    )
    factor: AtLeastOne = setting("Angles that turn slowly are divided by this.", 8.0, source="Llama 3.1: 8")
    original_max_position_embeddings: Count = setting(
        "llama3, yarn: context that the model was first trained with.", 8192, unit="tokens"
    )
    low_freq_factor: Positive = setting(
        "llama3: angles with fewer turns than this within the original context are divided.", 1.0, unit="turns"
    )
    high_freq_factor: Positive = setting("llama3: angles with more turns than this stay.", 4.0, unit="turns")
    beta_fast: Positive = setting(
        "yarn: angles with more turns than this within the original context stay.",
        32.0,
        unit="turns",
        source="arXiv 2309.00071",
    )
    beta_slow: Positive = setting(
        "yarn: angles with fewer turns than this are divided.", 1.0, unit="turns", source="arXiv 2309.00071"
    )
    attention_factor: Positive | None = setting(
        "yarn: queries and keys are multiplied by this; default: 0.1 ln(factor) + 1.", None, source="arXiv 2309.00071"
    )
    truncate: bool = setting("yarn: round the two bounds, which are indices of angles, outwards.", True)


class ModelConfig(Section):
    """Decoder-only transformer over one sequence of discrete tokens of all modalities."""

    kind: Annotated[str, OneOf(KINDS)] = setting(f"Feed-forward layers. {KINDS.help}", "moma")
    num_layers: Annotated[Count, Field(le=MOST_LAYERS)] = setting(
        "Transformer layers, counting Mixture-of-Depths layers.", unit="layers"
    )
    hidden_size: Count = setting("Width of the residual stream.")
    ffn_hidden_size: Count = setting("SwiGLU inner width of the dense FFN and of every expert.")
    num_attention_heads: Count = setting("Query heads.", unit="heads")
    num_query_groups: Count | None = setting(
        "Key/value heads (GQA); default: one for each query head.", None, unit="heads"
    )
    kv_channels: Count | None = setting("Width of a head; default: hidden_size / num_attention_heads.", None)
    seq_length: Count = setting("Tokens of a packed sequence.", 4096, unit="tokens")
    norm: Annotated[str, OneOf(NORMS)] = setting(
        f"Placement of RMSNorm. {NORMS.help}",
        "pre",
        source="MoMa 2.2, Chameleon 2.3",
    )
    norm_eps: Epsilon = setting("Epsilon of RMSNorm.", 1e-5)
    qk_norm: bool = setting("RMSNorm over each head's query and key, before RoPE.", True, source="Chameleon 2.3")
    rope_base: AtLeastOne = setting("Base of the rotary position embedding.", 10_000.0)
    rope_scaling: RopeScalingConfig | None = setting(
        "Scale the rotary position embedding, for longer sequences or models that continue a Llama 3; null: no "
        "scaling.",
        None,
    )
    qkv_bias: bool = setting("Add biases to query, key and value projections. For models that continue a Qwen2.", False)
    untie: tuple[Annotated[str, OneOf(UNTIED)], ...] = setting(
        f"Parts with weights of their own for each modality: every token uses those of its modality "
        f"(Mixture-of-Transformers). {UNTIED.help} [attention, ffn, norms] in a dense model is the paper's.",
        (),
        source="Mixture-of-Transformers, arXiv 2411.04996, section 2",
    )
    tie_embeddings: bool = setting("Share the input embedding with the output layer.", False)
    init_std: Annotated[Positive, Field(le=10.0)] = setting(
        "Standard deviation of initial weights; output projections divide it by sqrt(2*layers).", 0.02
    )
    dropout: Share = setting("Dropout after attention and FFN. Its masks depend on the layout.", 0.0)
    backend: Literal["auto", "te", "torch"] = setting(
        "Implementation of linear layers, norms and attention. te: Transformer-Engine (CUDA only); torch: "
        "megatron-core and torch; auto: te where it can run. Checkpoints are the same.",
        "auto",
    )
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = setting(
        "Add weight gradients to the fp32 gradient buffer within the matrix product. Transformer-Engine's layers "
        "support it; the output layer and the torch backend need NVIDIA apex built with its CUDA extensions. auto: "
        "wherever it is supported.",
        "auto",
    )
    experts: ExpertsConfig = setting("Modality groups of experts.", ExpertsConfig())
    depth: DepthConfig | None = setting("Mixture-of-Depths; null: every layer sees every token.", None)
    auxiliary: AuxiliaryRoutersConfig = setting("Auxiliary routers for causal inference.", AuxiliaryRoutersConfig())

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def has_experts(self) -> bool:
        """Whether feed-forward layers are groups of experts."""
        return KINDS[self.kind].experts

    @property
    def per_modality(self) -> bool:
        """Whether each modality has its own group of experts."""
        return KINDS[self.kind].per_modality

    @property
    def norm_placement(self) -> NormPlacement:
        """Where norms are applied."""
        return NORMS[self.norm]

    @property
    def normalizes_experts(self) -> bool:
        """Whether every expert's output is normalised separately, and the sub-layer's output is not."""
        return self.has_experts and self.norm_placement.per_expert

    @property
    def experts_choose(self) -> bool:
        """Whether experts choose among tokens, later ones included; otherwise tokens choose, or there are none."""
        return self.has_experts and self.experts.token_choice is None

    @property
    def limits_experts(self) -> bool:
        """Whether an expert takes a limited number of the tokens of a scope (`experts.scope`)."""
        chosen = self.experts.token_choice
        return self.has_experts and (chosen is None or chosen.capacity_factor is not None)

    @property
    def routes(self) -> bool:
        """Whether the model has experts or Mixture-of-Depths layers that choose among tokens, later ones included."""
        return self.experts_choose or self.depth is not None

    @property
    def auxiliary_width(self) -> int | None:
        """Inner width of the auxiliary routers; None if the model has none."""
        if self.auxiliary.mode == "off" or not self.routes:
            return None
        return self.auxiliary.width or max(1, self.hidden_size // 2)

    @property
    def keeps_thresholds(self) -> bool:
        """Whether the model keeps moving averages of cut-offs."""
        return self.experts.threshold_decay > 0.0 and self.routes

    def is_depth_layer(self, layer: int) -> bool:
        """Whether the layer with this global index (from 0) is a Mixture-of-Depths layer."""
        return self.depth is not None and layer % self.depth.every == 0
