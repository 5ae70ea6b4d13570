"""Learning rate and batch size by Step Law (arXiv 2503.04715), as the centre of a sweep.

lr = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571, N parameters without the vocabulary's, D tokens, B in tokens. Fitted to
3,700 dense text models; for mixtures of experts the published runs follow the total N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.plan.parameters import Parameters

# Largest number of tokens of the runs that the law was fitted to.
_FITTED_TOKENS = 1e11


@dataclass(frozen=True)
class Suggestion:
    """The suggestion of Step Law for a run.

    Attributes:
        lr: peak learning rate.
        batch_tokens: tokens of an optimizer step.
        batch_sequences: the same in whole sequences.
        caveats: differences from the runs that the law was fitted to.
    """

    lr: float
    batch_tokens: float
    batch_sequences: int
    caveats: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale plan --json`."""
        return {
            "lr": self.lr,
            "batch_tokens": self.batch_tokens,
            "batch_sequences": self.batch_sequences,
            "caveats": list(self.caveats),
        }


def suggest(config: Config, parameters: Parameters) -> Suggestion:
    """Centre of a sweep for the number of tokens of the configuration."""
    tokens = tokens_per_step(config) * config.train.steps
    count = parameters.total - parameters.embedding - parameters.output
    batch = 0.58 * tokens**0.571
    caveats = ["fitted to text with AdamW, cosine decay and sequences of 2,048; mixed-modal runs may need other values"]
    if tokens > _FITTED_TOKENS:
        caveats.append(f"{tokens:.2g} tokens are {tokens / _FITTED_TOKENS:.0f} times the longest run of the fit")
    if config.model.has_experts:
        caveats.append("N counts all experts: the published mixtures follow total, not active parameters")
    if config.model.depth is not None:
        caveats.append("nothing is known about Mixture-of-Depths")
    if config.model.qk_norm or not config.model.norm_placement.before:
        caveats.append("QK-norm and norms after sub-layers tolerate larger rates and were not in the fit")
    return Suggestion(
        lr=1.79 * count**-0.713 * tokens**0.307,
        batch_tokens=batch,
        batch_sequences=max(1, round(batch / config.model.seq_length)),
        caveats=tuple(caveats),
    )
