"""Proposes a vocabulary and tokenizers for documents that are not prepared yet, and estimates their tokens.

sizing.py uses it. It reads no files: the caller passes facts.
"""

from __future__ import annotations

import math
from typing import Any

from mmscale.plan.proposal import Proposal, Rule
from mmscale.plan.sizing_inputs import Facts

SPECIAL_AND_BYTES = 261  # ids of byte-level BPE without merges
CHARACTERS_PER_ID = 150
TOKENS_PER_CODE = 200
PASSES = 16
GRIDS = (8, 16, 32)  # patches along an image's edge
PAD_MULTIPLE = 64
LEAST_HELD_OUT = 20  # documents to evaluate on
TEXT, IMAGE = "text", "image"


def of_prepared(found: Proposal, facts: Facts) -> dict[str, int]:
    """Add prepared data sets and their vocabulary to a proposal; returns the ids of each modality."""
    ids = dict(facts.ids or {})
    found.settings["data"] = _data_of(facts)
    found.settings["vocab"] = {"modalities": _modalities(ids, facts.marked)}
    if facts.reserved:
        found.settings["vocab"]["reserved"] = True
    return ids


def _data_of(facts: Facts) -> dict[str, Any]:
    """`data`: a path, or a blend in which every set is read as often as the others."""
    if len(facts.where) == 1:
        return {"path": facts.where[0]}
    total = max(1, sum(facts.tokens_of))
    pairs = zip(facts.where, facts.tokens_of, strict=True)
    return {"blend": [{"path": path, "weight": max(1e-6, round(tokens / total, 6))} for path, tokens in pairs]}


def of_documents(found: Proposal, facts: Facts, *, affordable: float, name: str) -> dict[str, int]:
    """Add vocabulary and tokenizers for documents to a proposal; returns the ids of each modality.

    Args:
        found: the proposal, which is extended.
        facts: about the documents.
        affordable: tokens that the smallest model can process within the budget.
        name: of the run.
    """
    text, why = _text_ids(facts)
    ids = {TEXT: text}
    prepare: dict[str, Any] = {"source": "documents", "documents": list(facts.where)}
    found.settings["data"] = {"path": f"data/{name}", "prepare": prepare}
    if facts.held_out is not None:
        found.rules.append(
            Rule("held-out documents", f"{facts.held_out:,}", "their `split` says so", "docs/reference/documents.md")
        )
    elif LEAST_HELD_OUT / facts.documents > 0.01:
        found.put(
            "data.prepare.held_out",
            float(f"{min(0.2, LEAST_HELD_OUT / facts.documents):.2g}"),
            f"{LEAST_HELD_OUT} documents to evaluate on, a fifth of all at most; 0.01 of more than 2,000",
            "docs/reference/documents.md",
        )
    grid, image = _image(facts, affordable) if facts.images else (0, {})
    if facts.images:
        ids[IMAGE] = _codes((facts.distinct_images or facts.images) * grid * grid)
    ids |= {one.modality: _codes(one.number * one.tokens) for one in facts.others}
    marked = [one.modality for one in facts.others]
    found.put(
        "vocab.modalities",
        _modalities(ids, marked),
        f"256 bytes, 5 special tokens, {why}",
        "configs/quickstart.yaml and configs/emoji.yaml have as many",
        shown=" + ".join(f"{size:,} {key}" for key, size in ids.items()),
    )
    if facts.images:
        patches = (facts.distinct_images or facts.images) * grid * grid
        found.rules.append(
            Rule(
                "image codes",
                f"{ids[IMAGE]:,}",
                f"one code for {TOKENS_PER_CODE} of {patches:,} patches, so that each is seen often; 16 to 8,192",
                "docs/emoji.md; Chameleon has 8,192 (arXiv 2405.09818)",
            )
        )
        found.put(
            "data.prepare.image",
            image,
            f"{grid} x {grid} patches = {grid * grid} tokens: "
            + (
                f"the most of 64, 256 and 1,024 of which the budget reads all pictures {PASSES} times, with patches of "
                "2 pixels at least"
                if _reads_often(facts, grid, affordable)
                else f"the fewest, since the budget reads the pictures less than {PASSES} times"
            ),
            "table of patches in docs/emoji.md",
            shown=f"{image['size']} x {image['size']} pixels, patches of {image['patch']}",
        )
    for one in facts.others:
        found.rules.append(
            Rule(
                f"{one.modality} codes",
                f"{ids[one.modality]:,}",
                f"one code for {TOKENS_PER_CODE} of {one.number * one.tokens:,} tokens; {one.tokens} tokens an item by "
                f"the defaults of its tokenizer: data.prepare.modalities.{one.modality} changes them",
                "docs/modalities.md",
            )
        )
    found.settings["vocab"]["pad_multiple"] = PAD_MULTIPLE
    return ids


def _text_ids(facts: Facts) -> tuple[int, str]:
    """Ids of the text tokenizer, and how the number of its merges was found."""
    characters = facts.characters or 0
    text = multiple(min(32_768, max(384, SPECIAL_AND_BYTES + characters // CHARACTERS_PER_ID)), 64)
    why = f"a merge for {CHARACTERS_PER_ID} of {characters:,} characters; 384 to 32,768"
    if facts.text_ids is None or facts.text_ids >= text:
        return text, why
    # Rounded down, so that every id is used; the bytes and the special tokens need 320.
    most = max(multiple(SPECIAL_AND_BYTES, 64), facts.text_ids // 64 * 64)
    all_ids = f"{facts.text_ids:,} ids, bytes and special tokens included"
    rounded = f"; {most:,} is the multiple of 64 below" if most < facts.text_ids else ""
    return most, f"and merges: these {characters:,} characters repeat enough for {all_ids}{rounded}"


def _modalities(ids: dict[str, int], marked: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    """The setting `vocab.modalities`."""
    return [{"name": key, "size": size} | ({"marks": True} if key in marked else {}) for key, size in ids.items()]


def tokens(found: Proposal, facts: Facts, ids: dict[str, int]) -> tuple[int, int, dict[str, float]]:
    """Tokens of one pass, of the longest document, and the share of each modality in them."""
    if facts.tokens is not None:
        counts = {name: facts.tokens.get(name, 0) for name in ids}
        longest = facts.longest or 1
    else:
        image = found.settings["data"]["prepare"].get("image")
        each = (image["size"] // image["patch"]) ** 2 if image else 0
        marks = 2 * (facts.images + sum(one.number for one in facts.others))
        # small vocabularies: 3 characters a token
        counts = {TEXT: (facts.characters or 0) // 3 + 2 * facts.documents + marks}
        counts |= {IMAGE: each * facts.images} if image else {}
        counts |= {one.modality: one.number * one.tokens for one in facts.others}
        items = sum(one.most * (one.tokens + 2) for one in facts.others)
        # In the worst case each byte is a token.
        longest = facts.most_images * (each + 2) + items + facts.most_bytes + 2
    total = sum(counts.values())
    return total, longest, {name: count / max(1, total) for name, count in counts.items()}


def _image(facts: Facts, affordable: float) -> tuple[int, dict[str, Any]]:
    """Patches along an image's edge, and the settings of its tokenizer."""
    grid = _grid(facts, affordable)
    patch = max(1, min(8, 2 ** round(math.log2(max(1.0, (facts.edge or 64) / grid)))))
    if grid * patch > 32 and grid == GRIDS[0]:
        patch = 4  # docs/emoji.md: larger patches lose too much
    return grid, {"kind": "kmeans", "size": grid * patch, "channels": facts.channels, "patch": patch}


def _grid(facts: Facts, affordable: float) -> int:
    best = min(GRIDS[0], max(1, facts.edge or GRIDS[0]))
    for grid in GRIDS:
        fits = (facts.edge or 64) >= 2 * grid
        if fits and _reads_often(facts, grid, affordable):
            best = grid
    # For example, a picture of 8 pixels has 4 x 4 patches of 2 x 2.
    return max(1, power_of_two(best if (facts.edge or 64) >= 2 * best else (facts.edge or 64) / 2))


def _reads_often(facts: Facts, grid: int, affordable: float) -> bool:
    """Whether the budget has tokens for PASSES passes over the pictures with so many patches along an edge."""
    return PASSES * facts.images * grid * grid <= affordable


def _codes(number: int) -> int:
    """Codes for a number of tokens of a modality."""
    return max(16, min(8192, power_of_two(number / TOKENS_PER_CODE)))


def power_of_two(value: float) -> int:
    """The largest power of two that is not larger."""
    return int(2 ** math.floor(math.log2(max(1.0, value))))


def multiple(value: float, of: int) -> int:
    """The smallest positive multiple that is not smaller."""
    return max(of, of * math.ceil(value / of))
