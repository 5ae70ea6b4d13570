"""Settings of the vocabulary and of the architecture (`vocab`, `model`).

Rules between them are in rules_model.py; values computed from them are in derived.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.section import (
    AtLeastOne,
    Count,
    Epsilon,
    Fraction,
    Index,
    Name,
    OneOf,
    Positive,
    Section,
    Share,
    setting,
)
from mmscale.tables.settings import KINDS, NORMS, RANKINGS, ROPE_SCALINGS, UNTIED, NormPlacement

MOST_LAYERS = 10_000


class ModalityVocab(Section):
    """One modality's share of the vocabulary."""

    name: Name = setting("Name of the modality, e.g. text or image.")
    size: Count = setting(
        "Number of token ids of this modality; the first modality includes the special tokens.", unit="ids"
    )
    marks: bool = setting(
        "Put each item between a begin and an end token of this modality, whose ids follow the other special tokens. "
        "Documents with files of the modality, and generation, need these tokens. Images always have `<boi>` and "
        "`<eoi>`.",
        False,
    )


class VocabConfig(Section):
    """Token ids: one contiguous range per modality, in this order, then padding up to a multiple."""

    modalities: tuple[ModalityVocab, ...] = setting(
        "Modalities in id order; the first one is text and includes the special tokens.",
        (ModalityVocab(name="text", size=57_344), ModalityVocab(name="image", size=8_192)),
        source="Chameleon, arXiv 2405.09818: 65,536 ids of which 8,192 are image codes",
    )
    pad_multiple: Count = setting(
        "The number of embedding rows is rounded up to a multiple of this; TP must divide it.", 128, unit="ids"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modalities in id order."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def marked(self) -> tuple[str, ...]:
        """Names of the modalities with separate begin and end tokens."""
        return tuple(modality.name for modality in self.modalities if modality.marks)

    @property
    def size(self) -> int:
        """Number of ids that can occur [ids]."""
        return sum(modality.size for modality in self.modalities)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and of the output layer [ids]."""
        return -(-self.size // self.pad_multiple) * self.pad_multiple

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open id range of each modality."""
        starts = [0]
        for modality in self.modalities:
            starts.append(starts[-1] + modality.size)
        return tuple(pairwise(starts))


class ExpertsConfig(Section):
    """Feed-forward experts (MoMa, arXiv 2407.21770, section 2.2)."""

    counts: dict[Name, Count] = setting(
        "Number of experts of each modality group, e.g. {text: 4, image: 4}; with kind=moe one group, {mixed: 8}.",
        {},
        unit="experts",
    )
    shared: Index = setting("Number of shared experts, which process every token of every modality.", 0, unit="experts")
    shared_ffn_hidden_size: Count | None = setting(
        "SwiGLU width of each shared expert; default: ffn_hidden_size.", None
    )
    capacity: Literal["nominal", "actual"] = setting(
        "Tokens that determine the capacity of a group's experts. nominal: a fixed share of all tokens "
        "(model.experts.share), so that shapes are static; actual: the group's tokens in the sequence or "
        "micro-batch (model.experts.scope), as in the paper.",
        "nominal",
        source="MoMa 2.2",
    )
    capacity_factor: Annotated[Positive, Field(le=1000.0)] = setting(
        "An expert takes capacity_factor * (tokens of its group, by model.experts.capacity) / (experts of the group) "
        "tokens.",
        1.0,
    )
    capacity_multiple: Count = setting(
        "Tokens per expert are rounded up to a multiple of this; with FP8 also of 16 or 128.", 1, unit="tokens"
    )
    scope: Literal["sequence", "micro_batch"] = setting(
        "Tokens among which an expert chooses: those of each sequence (independent of the micro-batch size) or "
        "those of the whole micro-batch (the paper's reading).",
        "sequence",
        source="MoMa 2.2 says 'a batch'",
    )
    share: Literal["auto"] | dict[Name, Share] = setting(
        "Nominal share of each modality in the tokens, which determines static capacities; auto: the share measured "
        "during data preparation.",
        "auto",
    )
    choice: Annotated[str, OneOf(RANKINGS)] = setting(
        f"Value by which an expert ranks tokens. {RANKINGS.help} "
        "The gate is the sigmoid of the logit under every choice.",
        "sigmoid",
        source="MoMa 2.2; softmax: expert choice, arXiv 2202.09368",
    )
    noise: Literal["none", "gumbel"] = setting(
        "Router noise in training: Gumbel-sigmoid, sigmoid(logits + G' - G'').", "none", source="MoMa 2.5"
    )
    compute: Literal["auto", "bmm", "grouped_mm", "te"] = setting(
        "Implementation of the experts' matrix products: batched products (bmm), torch's grouped_mm, or "
        "Transformer-Engine's grouped linear (te). auto: te if model.backend is te and FP8 needs it, otherwise bmm. "
        "Weights and results are the same; `mmscale bench experts` measures them.",
        "auto",
    )
    fused_swiglu: bool | None = setting(
        "SwiGLU of the experts as one compiled function that keeps only its input; default: on with CUDA.",
        None,
        source="mcore fusions/fused_bias_swiglu.py",
    )
    cuda_graph: bool = setting(
        "Capture each group's experts as CUDA graphs; needs CUDA, one micro-batch in flight and no full recomputation.",
        False,
    )
    threshold_decay: Share = setting(
        "Decay per step of the moving average of each expert's cut-off. `--routing threshold` needs it; 0: no average "
        "is kept.",
        0.0,
        source="Expert Threshold, arXiv 2603.11535",
    )


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


class AuxiliaryRoutersConfig(Section):
    """Routers that predict expert and depth choice from one token, for causal inference (MoMa, section 2.4)."""

    mode: Literal["off", "stage", "joint"] = setting(
        "off: the main run has no auxiliary routers, and `mmscale train CONFIG --stage auxiliary` adds and trains them "
        "afterwards; joint: they are trained together with the main run and do not change its weights; stage: set by "
        "the auxiliary stage.",
        "off",
    )
    width: Count | None = setting("Inner width; default: half of hidden_size.", None, source="MoMa 2.4")


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
        f"Parts of a layer with weights of their own for each modality: every token uses those of its modality "
        f"(Mixture-of-Transformers). {UNTIED.help} All of them in a dense model: [attention, ffn, norms].",
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
    def routes(self) -> bool:
        """Whether the model has experts or Mixture-of-Depths layers, which choose among tokens."""
        return self.has_experts or self.depth is not None

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
