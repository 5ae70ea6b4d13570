"""Finds groups with documents in both splits, which happens where documents of a group name different splits.

Every part keeps its groups with the smallest hashes in done/<part>.groups. The parts of a data set keep the same
range of hashes in common, so groups of several parts are found, and of large data sets the number is a lower bound.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.documents.schema import TRAIN, VALIDATION, Document
from mmscale.runtime.atomic_files import write_atomic

SUFFIX = ".groups"  # JSON; not .json, which are the records of parts
KEPT = 2048  # groups of a part: usually less than 300 KB
_LONGEST = 200  # characters of a name and of a place that are kept
_SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class GroupSplits:
    """Groups of a data set and their splits.

    Attributes:
        both: number of groups with documents in both splits.
        example: one of them, with places of its documents; "": there is none.
        hashed: documents without `split`.
    """

    both: int = 0
    example: str = ""
    hashed: int = 0

    def lines(self, *, of: str = "") -> list[str]:
        """A line about the groups in both splits, with a remedy; empty if there are none."""
        if not self.both:
            return []
        owner = f" of {of}" if of else ""
        groups, have = ("group", "has") if self.both == 1 else ("groups", "have")
        return [
            f"{self.both:,} {groups}{owner} {have} documents in both splits, because documents that name a split keep "
            f"it (for instance {self.example}): held-out numbers measure memory. Give all documents of one group the "
            'same "split", or none, and prepare again'
        ]


def keep_groups(file: Path, documents: Iterable[Document], *, held_out: float, kept: int = KEPT) -> None:
    """Write the groups of a part: for each its name and, by split, a place of a document that names the split.

    Args:
        file: to write, atomically.
        documents: of the part.
        held_out: share of groups that a hash holds out.
        kept: groups at most.
    """
    found: dict[str, dict[str, str]] = {}
    hashed = 0
    for document in documents:
        group = document.id if document.group is None else document.group
        places = found.setdefault(group, {})
        split = document.split_for(held_out)
        if document.split is None:
            hashed += 1
            places.setdefault(split, "")
        else:
            places[split] = places.get(split) or document.where[-_LONGEST:]
    smallest = sorted((_hash(group), group) for group in found)[:kept]
    groups = {
        key: [group[:_LONGEST] if any(found[group].values()) else "", *(found[group].get(one) for one in _SPLITS)]
        for key, group in smallest
    }
    write_atomic(file, json.dumps({"hashed": hashed, "full": len(smallest) == kept, "groups": groups}))


def group_splits(files: Iterable[Path]) -> GroupSplits | None:
    """The groups in both splits.

    Args:
        files: of every part, from `keep_groups`.

    Returns:
        None if a file is missing or damaged, as in data sets of earlier versions.
    """
    groups: dict[str, list[Any]] = {}
    limit, hashed = "g", 0  # greater than every hexadecimal number
    for file in files:
        try:
            content = bounded.read_object(file)
            hashed += int(content["hashed"])
            own = {str(key): list(value) for key, value in content["groups"].items()}
        except (OSError, *bounded.BAD_CONTENT):
            return None
        if content.get("full"):
            limit = min(limit, max(own, default=limit))
        for key, value in own.items():
            known = groups.setdefault(key, ["", None, None])
            groups[key] = [old or (new if old is None else new or old) for old, new in zip(known, value, strict=True)]
    both = [value for key, value in sorted(groups.items()) if key <= limit and None not in value]
    return GroupSplits(len(both), _described(both[0]) if both else "", hashed)


def _described(value: list[Any]) -> str:
    places = [f"{split}: {place or 'by its hash'}" for split, place in zip(_SPLITS, value[1:], strict=True)]
    return f"{value[0]!r}, {', '.join(places)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
