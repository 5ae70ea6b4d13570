"""Rules of the items that a processor's model generates, for mmscale.inference.generate."""

from __future__ import annotations

import functools
from typing import Any

from checkpoints_tools.huggingface.shipped.decoding_moma import before_items, branch_of
from checkpoints_tools.huggingface.shipped.grammar_moma import ImageGrammar
from checkpoints_tools.huggingface.shipped.guidance_moma import ClassifierFreeGuidance, ContrastiveDecoding
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.config import Config
from mmscale.errors import UsageError
from mmscale.inference.generate import ItemRules, PromptStrength, Sampling


def item_rules(processor: MomaProcessor) -> list[ItemRules]:
    """Rules of each modality whose items the model can generate, images first."""
    names = [*(["image"] if processor.codes is not None else []), *processor.codecs]
    return [
        ItemRules(
            name, one.first, one.end, one.tokens, one.boi, one.eoi, one, functools.partial(strength, processor, one)
        )
        for name, one in zip(names, processor.item_grammars(), strict=True)
    ]


def strength(processor: Any, item: ImageGrammar, model: Any, sampling: Sampling, use_cache: bool) -> PromptStrength:
    """Guidance or contrastive decoding of one modality, as the sampling says; neither: nothing."""
    if sampling.guidance == 1.0 and not sampling.cd_k:
        return PromptStrength()
    branch = branch_of(model, item, before_items(processor, sampling.unconditional), use_cache=use_cache)
    if sampling.cd_k:
        return PromptStrength(last=(ContrastiveDecoding(branch, k=sampling.cd_k, alpha=sampling.cd_alpha),))
    return PromptStrength(first=(ClassifierFreeGuidance(branch, scale=sampling.guidance),))


def refuse_unlearned_mask(config: Config, unconditional: str) -> None:
    """Refuse `<mask:0>` in place of the prompt for models that were not trained with it.

    Raises:
        UsageError: the model is one.
    """
    if unconditional == "mask" and not (config.vocab.reserved and config.objective.cm3_rate):
        why = (
            "the vocabulary of this model has no tokens for holes"
            if not config.vocab.reserved
            else "this model was not trained with causal masking (objective.cm3_rate is 0)"
        )
        raise UsageError(
            f"--unconditional mask: {why}",
            remedy="leave it away, or train with vocab.reserved=true and objective.cm3_rate, e.g. 0.5",
        )
