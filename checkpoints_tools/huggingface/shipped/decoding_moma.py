"""What a processor offers for generation: which special tokens may follow, and processors that strengthen the prompt.

Shipped next to the weights.
"""

from collections.abc import Sequence
from typing import Any

from .grammar_moma import Grammar, ImageGrammar, SpecialGrammar
from .guidance_moma import ClassifierFreeGuidance, ContrastiveDecoding, UnconditionalBranch
from .infilling_moma import END, LAST_SPECIAL, MOST

HOLE_TOKENS = tuple(f"<mask:{number}>" for number in range(MOST))
ROLES = ("<system>", "<user>", "<assistant>", "<tool>")
UNCONDITIONAL = ("none", "mask")


def special_grammar(processor: Any) -> SpecialGrammar:
    """Excludes special tokens that cannot follow in the sequences of a processor's model."""
    tokenizer, known = processor.tokenizer, processor.tokenizer.get_vocab()
    never = [known["<pad>"], tokenizer.bos_token_id]  # by name: a user's padding may be `</s>`
    if processor.codes is None:
        never += [processor.boi, processor.eoi]
    for name in processor.marked:
        if name not in processor.codecs:
            never += tokenizer.convert_tokens_to_ids([f"<begin_{name}>", f"<end_{name}>"])
    if not has_holes(processor):
        return SpecialGrammar(never)
    never += [known[name] for name in (*HOLE_TOKENS, END)]
    return SpecialGrammar(
        never, roles=[known[name] for name in ROLES], after=[tokenizer.bos_token_id, known[LAST_SPECIAL]]
    )


def has_holes(processor: Any) -> bool:
    """Whether the vocabulary has the tokens for holes and messages."""
    known = processor.tokenizer.get_vocab()
    return all(name in known for name in (*HOLE_TOKENS, END, *ROLES, LAST_SPECIAL))


def before_items(processor: Any, unconditional: str) -> list[int]:
    """Ids before the begin token of an item without its prompt.

    Args:
        processor: of the model.
        unconditional: "none": `<s>`; "mask": `<s> <mask:0>`, a document of causal masking whose text is a hole.

    Raises:
        ValueError: it is neither, or the vocabulary has no tokens for holes.
    """
    if unconditional not in UNCONDITIONAL:
        raise ValueError(f"unconditional={unconditional!r} is not one of {', '.join(UNCONDITIONAL)}")
    begin = processor.tokenizer.bos_token_id
    if unconditional == "none":
        return [begin]
    if not has_holes(processor):
        raise ValueError("this model has no tokens for holes: use unconditional='none'")
    return [begin, processor.tokenizer.get_vocab()[HOLE_TOKENS[0]]]


def branch_of(model: Any, item: ImageGrammar, before: Sequence[int], *, use_cache: bool = True) -> UnconditionalBranch:
    """The distribution of an item's tokens without its prompt."""
    return UnconditionalBranch(
        model, first=item.first, end=item.end, tokens=item.tokens, opens=item.boi, before=before, use_cache=use_cache
    )


def guidance(processor: Any, model: Any, *, scale: float, unconditional: str) -> Grammar:
    """Classifier-free guidance for all items.

    Raises:
        ValueError: as `before_items`; the model was not trained with causal masking.
    """
    before = _before(processor, model, unconditional)
    return Grammar(
        [ClassifierFreeGuidance(branch_of(model, item, before), scale=scale) for item in processor.item_grammars()]
    )


def contrastive(processor: Any, model: Any, *, k: int, alpha: float, unconditional: str) -> Grammar:
    """Contrastive decoding for all items.

    Raises:
        ValueError: as `guidance`; k or alpha is out of range.
    """
    before = _before(processor, model, unconditional)
    return Grammar(
        [ContrastiveDecoding(branch_of(model, item, before), k=k, alpha=alpha) for item in processor.item_grammars()]
    )


def _before(processor: Any, model: Any, unconditional: str) -> list[int]:
    if unconditional == "mask" and not masking_rate(model):
        raise ValueError("this model was not trained with causal masking (objective.cm3_rate is 0)")
    return before_items(processor, unconditional)


def masking_rate(model: Any) -> float:
    """The share of its training documents that had holes when it learned to fill them; 0: never, or it is unknown."""
    run = getattr(model.config, "mmscale", None) or {}
    if run.get("masking"):  # of an attempt before the one with the newest settings
        return float(run["masking"]["rate"])
    return float(run.get("config", {}).get("objective", {}).get("cm3_rate", 0.0))


__all__ = ["before_items", "branch_of", "contrastive", "guidance", "has_holes", "masking_rate", "special_grammar"]
