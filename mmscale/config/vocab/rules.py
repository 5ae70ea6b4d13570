"""Rules about the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

# <pad> <s> </s> <boi> <eoi>, see data/vocab.py (which imports this package, so the number is repeated here).
_SPECIAL_TOKENS = 5
_RESERVED_TOKENS = 22  # RESERVED in data/vocab.py


_RESERVED = frozenset(
    [
        "append",
        "apply",
        "buffers",
        "children",
        "clear",
        "copy",
        "cpu",
        "cuda",
        "double",
        "eval",
        "extend",
        "fromkeys",
        "get",
        "half",
        "float",
        "forward",
        "insert",
        "items",
        "keys",
        "modules",
        "parameters",
        "pop",
        "popitem",
        "setdefault",
        "to",
        "train",
        "training",
        "type",
        "update",
        "values",
    ]
)


def _vocab(config: Config) -> Iterator[Problem]:
    modalities = config.vocab.modalities
    if not modalities:
        yield Problem("vocab.modalities is empty", "name at least a text modality with its number of ids")
        return
    if len(set(config.vocab.names)) < len(modalities):
        yield Problem(
            f"vocab.modalities: names repeat: {', '.join(config.vocab.names)}", "give each modality its own name"
        )
    for name in sorted({*config.vocab.names, *config.model.experts.counts}):
        # Names become parts of parameter names; torch refuses dots and the names of attributes of its containers.
        if "." in name or name in _RESERVED:
            yield Problem(
                f"the modality or expert group {name!r} cannot be part of a parameter's name",
                "choose a name without dots that no torch module has as an attribute, e.g. text or image",
            )
    for name in config.vocab.marked:
        if name in (modalities[0].name, "image"):
            yield Problem(
                f"vocab.modalities: {name} has marks: only modalities after the first take them, and image has its own",
                "remove marks there",
            )
    special = _SPECIAL_TOKENS + 2 * len(config.vocab.marked) + _RESERVED_TOKENS * config.vocab.reserved
    if modalities[0].size < special:
        yield Problem(
            f"vocab.modalities.0.size: {modalities[0].name} has {modalities[0].size} ids, fewer than the "
            f"{special} special tokens that stand in the first range",
            "give the first modality more ids",
        )
    unknown = sorted(set(config.train.modality_weights) - set(config.vocab.names))
    if unknown:
        yield Problem(
            f"train.modality_weights: {', '.join(unknown)} is not in vocab.modalities "
            f"({', '.join(config.vocab.names)})",
            "use the names of vocab.modalities",
        )
    weights = [config.train.modality_weights.get(name, 1.0) for name in config.vocab.names]
    if not any(weights):
        yield Problem(
            "train.modality_weights: every modality has weight 0, nothing is learned", "give one a positive weight"
        )


RULES: tuple[Rule, ...] = (_vocab,)
