"""The vocabulary in a tokenizer.json.

It is a table of ids, or with Unigram a list of pieces with scores, whose places in the list are their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def ids_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the words of a model.

    Args:
        model: the entry "model" of a tokenizer.json.
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def with_ids(
    model: Mapping[str, Any], ids: Mapping[str, int], *, renamed: Callable[[str], str] = lambda name: name
) -> dict[str, Any]:
    """The model with these words and ids; new words have the lowest score.

    Args:
        model: the entry "model" of a tokenizer.json.
        ids: of all words; those of a list must be 0, 1, 2, ...
        renamed: new names of the model's words.
    """
    if not isinstance(model["vocab"], list):
        return {**model, "vocab": dict(ids)}
    scores = {renamed(piece): score for piece, score in model["vocab"]}
    listed = sorted(ids, key=lambda name: ids[name])
    assert [ids[name] for name in listed] == list(range(len(listed))), "places of a list are ids"
    least = min(scores.values())
    unknown = None if model.get("unk_id") is None else ids[renamed(model["vocab"][model["unk_id"]][0])]
    return {**model, "vocab": [[name, scores.get(name, least)] for name in listed], "unk_id": unknown}
