"""Settings of the experts and their routing (`model.experts`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.section import Count, Index, Name, OneOf, Positive, Section, Share, setting
from mmscale.tables.settings import RANKINGS, SCORES


class TokenChoiceConfig(Section):
    """Token choice: every token goes to the experts of its group with the highest scores, as in most other projects."""

    scores: Annotated[str, OneOf(SCORES)] = setting(f"Scores of the experts. {SCORES.help}", "sigmoid")
    top_k: Count = setting(
        "Experts that a token goes to. An expert's output is multiplied by its score, divided by the sum of the scores "
        "of the token's experts if there are several.",
        1,
        unit="experts",
    )
    bias_rate: Share = setting(
        "Step of each expert's bias, which is added to its score for the choice only: raised after an optimizer step "
        "in which the expert got fewer tokens than the mean of its group, lowered if it got more. 0: biases stay.",
        0.001,
        source="DeepSeek-V3, arXiv 2412.19437, section 2.1.2; arXiv 2408.15664",
    )
    capacity_factor: Annotated[Positive, Field(le=1000.0)] | None = setting(
        "In training an expert takes at most capacity_factor * top_k * (nominal tokens of its group) / (experts of "
        "the group) of a sequence or micro-batch (model.experts.scope), the earliest ones; the others are dropped. "
        "null: no token is dropped. Evaluation and generation never drop tokens.",
        None,
    )


class ExpertsConfig(Section):
    """Feed-forward experts (MoMa, arXiv 2407.21770, section 2.2)."""

    counts: dict[Name, Count] = setting(
        "Number of experts of each modality group, e.g. {text: 4, image: 4}; with kind=moe one group, {mixed: 8}.",
        {},
        unit="experts",
    )
    ungated: tuple[Name, ...] = setting(
        "Groups of one expert whose expert is an ordinary feed-forward layer: it takes every token of its modality, "
        "without router, gate and capacity, and every expert-parallel rank holds a copy.",
        (),
        source="Mixture-of-Transformers, arXiv 2411.04996, section 2",
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
    token_choice: TokenChoiceConfig | None = setting(
        "Tokens choose experts, as in most other projects; the model is then causal as it is. null: experts choose "
        "tokens, as in MoMa.",
        None,
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
