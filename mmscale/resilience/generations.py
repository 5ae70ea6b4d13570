"""The index of a run's snapshots in memory, `memory.json` in the run folder, and the choice of one for a restart.

A generation is the snapshots of one attempt. This module has file access and pure decisions; no torch, no collectives.
Every rank is given the same offers and so makes the same choice.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.resilience.lease import inode
from mmscale.resilience.snapshot_files import Marker
from mmscale.runtime.atomic_files import write_atomic

INDEX = "memory.json"
FORMAT = 1


@dataclass(frozen=True)
class Generation:
    """The snapshots of one attempt.

    Attributes:
        name: random; part of every commit marker.
        attempt: attempt of the run.
        identity: properties that must be equal for an exact restart: layout, configuration.
        groups: ranks of each parity group, in member order.
        folders: name of each rank's folder.
    """

    name: str
    attempt: int
    identity: dict[str, Any]
    groups: tuple[tuple[int, ...], ...]
    folders: tuple[str, ...]

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The parity group of a rank."""
        return next(group for group in self.groups if rank in group)


def write_index(run: Path, generations: Sequence[Generation]) -> None:
    """Write the index of snapshots, newest generation last; without generations the file is removed.

    One process calls it.
    """
    file = run / INDEX
    if not generations:
        file.unlink(missing_ok=True)
        return
    run.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "folder": inode(run), "generations": [asdict(one) for one in generations]}
    # Not durable: snapshots are in memory.
    write_atomic(file, json.dumps(content, indent=1), mode=0o600, durable=False)


def read_index(run: Path) -> list[Generation]:
    """The index that `write_index` wrote in this folder; empty if it is missing or cannot be read.

    In a copied folder the index is ignored: its snapshots belong to the original, and the copy must neither resume from
    them nor end them. A renamed folder keeps its snapshots.
    """
    try:
        content = bounded.read_json(run / INDEX)
        if content["format"] != FORMAT or content.get("folder", inode(run)) != inode(run):
            return []
        return [
            Generation(
                name=str(entry["name"]),
                attempt=int(entry["attempt"]),
                identity=dict(entry["identity"]),
                groups=tuple(tuple(int(rank) for rank in group) for group in entry["groups"]),
                folders=tuple(str(folder) for folder in entry["folders"]),
            )
            for entry in content["generations"]
        ]
    except (OSError, *bounded.BAD_CONTENT):
        return []


@dataclass(frozen=True)
class Offer:
    """A committed slot that a rank of the new attempt can read.

    Attributes:
        rank: owner of the state.
        slot: number in its folder.
        holder: rank of the new attempt that can read it.
        marker: its commit marker.
    """

    rank: int
    slot: int
    holder: int
    marker: Marker


@dataclass(frozen=True)
class ChosenSnapshot:
    """The snapshot to resume from.

    Attributes:
        step: its step.
        sources: the offer used for each rank.
        lost: ranks without an offer, which are rebuilt from their group's parity.
    """

    step: int
    sources: dict[int, Offer]
    lost: tuple[int, ...]


def choose(generation: Generation, offers: Collection[Offer], *, above: int) -> tuple[ChosenSnapshot | None, list[str]]:
    """The newest snapshot of which every parity group lacks at most one member, and the reasons against the others.

    Args:
        generation: the snapshots' generation.
        offers: committed slots; if several ranks hold a slot, its own rank is preferred.
        above: step of the newest checkpoint on disk, which is preferred if it is as new.
    """
    reasons: list[str] = []
    by_serial: dict[int, dict[int, Offer]] = {}
    for offer in sorted(offers, key=lambda offer: (offer.holder != offer.rank, offer.holder)):
        if stale := _stale(generation, offer):
            reasons.append(f"rank {offer.rank}: {stale}")
            continue
        by_serial.setdefault(offer.marker.serial, {}).setdefault(offer.rank, offer)
    if not by_serial:
        reasons.append("no rank's memory holds a committed snapshot")
    for _, sources in sorted(by_serial.items(), reverse=True):
        step = max(offer.marker.step for offer in sources.values())
        problems = [problem for group in generation.groups if (problem := _lacks(group, sources))]
        if problems:
            reasons += [f"step {step}: {problem}" for problem in problems]
        elif len({offer.marker.step for offer in sources.values()}) > 1:
            reasons.append(f"step {step}: commit markers of one snapshot name different steps")
        elif step <= above:
            return None, [*reasons, f"step {step} is not newer than the checkpoint of step {above}"]
        else:
            lost = tuple(rank for rank in range(len(generation.folders)) if rank not in sources)
            return ChosenSnapshot(step, sources, lost), reasons
    return None, list(dict.fromkeys(reasons))


def _stale(generation: Generation, offer: Offer) -> str:
    marker = offer.marker
    if marker.generation != generation.name or marker.attempt != generation.attempt:
        return f"a stale commit marker of attempt {marker.attempt}"
    if marker.rank != offer.rank or marker.members != generation.group_of(offer.rank):
        return f"a commit marker of rank {marker.rank}"
    return ""


def _lacks(group: tuple[int, ...], sources: dict[int, Offer]) -> str:
    there = [sources[rank].marker for rank in group if rank in sources]
    lost = [rank for rank in group if rank not in sources]
    if len(lost) == len(group):
        return f"all of ranks {lost} have lost their memory"
    if len(lost) > 1:
        return f"ranks {lost} have lost their memory, and parity replaces one of a group"
    if len({(marker.lengths, marker.digests) for marker in there}) > 1:
        return f"the commit markers of ranks {list(group)} contradict each other"
    return ""
