"""The settings of a MoMa feed-forward layer besides the TransformerConfig: groups of experts and how they choose."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.model.expert_compute import BATCHED, ExpertCompute


@dataclass(frozen=True)
class TokenChoiceSettings:
    """How tokens choose experts (token_choice.py).

    Attributes:
        scores: a key of token_choice.SCORES.
        top_k: experts of a token.
        capacity_factor: limits the tokens of an expert in training; None: no limit.
    """

    scores: str = "sigmoid"
    top_k: int = 1
    capacity_factor: float | None = None


@dataclass(frozen=True)
class ExpertGroup:
    """One group of experts.

    Attributes:
        name: name of the modality, or of the mixed group.
        modalities: indices of the modalities whose tokens it takes.
        experts: number of experts.
        share: nominal share of its tokens among all tokens.
    """

    name: str
    modalities: tuple[int, ...]
    experts: int
    share: float


@dataclass(frozen=True)
class MoMaSettings:
    """The settings of a MoMa feed-forward layer besides the TransformerConfig.

    Attributes:
        groups: groups of experts, each with its own router.
        ungated: groups of one expert without a router, which takes all their tokens (ungated.py).
        per_sequence: an expert chooses within each sequence instead of the micro-batch.
        actual: capacities follow the tokens of the micro-batch instead of nominal shares.
        capacity_factor: slots of a group relative to its tokens.
        capacity_multiple: slots per expert are rounded up to a multiple of this.
        choice: how an expert ranks tokens, a key of ranking.RANKINGS.
        token_choice: how tokens choose experts; None: experts choose tokens.
        gumbel: Gumbel-sigmoid noise in training.
        noise_seed: the run's seed, which also seeds the noise.
        norm_experts: normalise each expert's output before its gate (norm placement `post_per_expert`).
        shared_width: SwiGLU width of the shared experts together; 0: none.
        auxiliary_width: inner width of each group's auxiliary router; None: there are none.
        thresholds: whether the averaged cut-offs of Expert Threshold are kept.
        compute: implementation of the experts, with `auto` resolved.
        overlap: each group's tokens are exchanged while other experts compute.
    """

    groups: tuple[ExpertGroup, ...]
    ungated: tuple[ExpertGroup, ...] = ()
    per_sequence: bool = True
    actual: bool = False
    capacity_factor: float = 1.0
    capacity_multiple: int = 1
    choice: str = "sigmoid"
    token_choice: TokenChoiceSettings | None = None
    gumbel: bool = False
    noise_seed: int = 0
    norm_experts: bool = False
    shared_width: int = 0
    auxiliary_width: int | None = None
    thresholds: bool = False
    compute: ExpertCompute = BATCHED
    overlap: bool = False
