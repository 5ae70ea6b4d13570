"""Recovers a rank's image from the memory of a dead attempt: found, verified, and rebuilt from parity if lost.

Every rank calls `recover`; either all of them get an image of the same step, or none does. state_image.py defines the
content of an image. The ranks of the new attempt do the work over their host group, without the old guards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.resilience import parity, snapshot_files
from mmscale.resilience.generations import ChosenSnapshot, Generation, Offer, choose
from mmscale.resilience.snapshot_files import UnusableError
from mmscale.runtime.groups import gathered

_AT_ONCE = 64 << 20  # bytes of one message


@dataclass(frozen=True)
class Recovered:
    """This rank's image.

    Attributes:
        step: its step.
        image: [bytes]; may be a private view of a file in shared memory.
        lost: ranks whose images were rebuilt from parity.
        seconds: from the start of the search to the last digest.
        rebuild_s: of these, for sending and XORing bytes.
    """

    step: int
    image: Tensor
    lost: tuple[int, ...]
    seconds: float
    rebuild_s: float


class Recovery:
    """A recovery from one generation's memory. Every rank creates it and makes the same calls.

    Args:
        generation: of the snapshots.
        group: all ranks, on the host (gloo).
        root: folder of the snapshot folders.
    """

    def __init__(self, generation: Generation, *, group: ProcessGroup, root: Path = snapshot_files.ROOT) -> None:
        self.generation = generation
        self.group = group
        self.root = root
        self.rank = torch.distributed.get_rank(group)
        self._mapped: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def recover(self, *, above: int) -> tuple[Recovered | None, list[str]]:
        """This rank's image of the newest usable snapshot after step `above`, or None; and why others are refused."""
        began = time.monotonic()
        offers, problems = self._offers()
        while True:  # an offer with a wrong digest is dropped: choose again without it
            choice, reasons = choose(self.generation, offers, above=above)
            if choice is None:
                return None, list(dict.fromkeys([*problems, *reasons]))
            bad = self._verify(choice)
            if not bad:
                break
            problems += [f"rank {rank}: {problem}" for (rank, _), problem in sorted(bad.items())]
            offers = [offer for offer in offers if (offer.rank, offer.slot) not in bad]
        moving = time.monotonic()
        image = self._image(choice)
        found = snapshot_files.digest(image.numpy())
        group = self.generation.group_of(self.rank)
        said = next(offer.marker for rank, offer in choice.sources.items() if rank in group)
        wrong = [
            rank for rank, whole in enumerate(self._gather(found == said.digests[group.index(self.rank)])) if not whole
        ]
        if wrong:
            return None, [*problems, f"step {choice.step}: what was put together for ranks {wrong} has a wrong digest"]
        ended = time.monotonic()
        refused = list(dict.fromkeys([*problems, *reasons]))
        return Recovered(choice.step, image, choice.lost, ended - began, ended - moving), refused

    def _gather(self, value: Any) -> list[Any]:
        return gathered(value, group=self.group)

    def _offers(self) -> tuple[list[Offer], list[str]]:
        """The slots that all ranks can read. A folder is found by its random name, on any node."""
        mine: list[Offer] = []
        problems: list[str] = []
        for rank, name in enumerate(self.generation.folders):
            folder = snapshot_files.existing_folder(name, self.root)
            if folder is None:
                continue
            markers, found = snapshot_files.committed(folder)
            mine += [Offer(rank, slot, self.rank, marker) for slot, marker in markers.items()]
            problems += [f"rank {rank}: {problem}" for problem in found]
        gathered = self._gather((mine, problems))
        return [offer for offers, _ in gathered for offer in offers], [text for _, texts in gathered for text in texts]

    def _verify(self, choice: ChosenSnapshot) -> dict[tuple[int, int], str]:
        """Slots of the choice whose bytes do not match their markers, hashed by their holders."""
        bad: dict[tuple[int, int], str] = {}
        for offer in choice.sources.values():
            if offer.holder != self.rank:
                continue
            folder, marker = self._folder(offer), offer.marker
            member = marker.members.index(offer.rank)
            try:
                image = snapshot_files.image_file(folder, offer.slot)
                if snapshot_files.file_digest(image, marker.lengths[member]) != marker.digests[member]:
                    raise UnusableError(f"the digest of {image.name} is wrong")
                if any(rank in choice.lost for rank in marker.members):
                    kept = snapshot_files.parity_file(folder, offer.slot)
                    chunk = parity.chunk_bytes(marker.lengths)
                    if snapshot_files.file_digest(kept, chunk) != marker.parity_digest:
                        raise UnusableError(f"the digest of {kept.name} is wrong")
            except UnusableError as error:
                bad[offer.rank, offer.slot] = str(error)
        return {slot: problem for found in self._gather(bad) for slot, problem in found.items()}

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _image(self, choice: ChosenSnapshot) -> Tensor:
        """This rank's image, while this rank also serves the others.

        All ranks go through the same list of messages in the same order, so no cycle of waits can occur.
        """
        mine: Tensor | None = None
        for rank in range(len(self.generation.folders)):
            found = self._rebuild(choice, rank) if rank in choice.lost else self._fetch(choice.sources[rank])
            mine = found if rank == self.rank else mine
        assert mine is not None
        return mine

    def _fetch(self, offer: Offer) -> Tensor | None:
        """A whole image: a view of the file if its rank is still on the same node, otherwise received."""
        source = self._held(offer)[0] if offer.holder == self.rank else None
        if offer.holder == offer.rank:
            return source
        length = offer.marker.lengths[offer.marker.members.index(offer.rank)]
        image = torch.empty(length if self.rank == offer.rank else 0, dtype=torch.uint8)

        def take(begin: int, part: Tensor) -> None:
            image[begin : begin + part.numel()] = part

        self._move(offer.holder, offer.rank, length, source=source, take=take)
        return image

    def _rebuild(self, choice: ChosenSnapshot, lost: int) -> Tensor | None:
        """A lost rank's image, XORed by that rank from the contributions of its group's survivors."""
        group = self.generation.group_of(lost)
        survivors = [choice.sources[rank] for rank in group if rank != lost]
        member, lengths = group.index(lost), survivors[0].marker.lengths
        image = np.zeros(lengths[member] if self.rank == lost else 0, np.uint8)
        for stripe in range(len(group)):
            if stripe == member:
                continue
            place = parity.piece(
                member=member, stripe=stripe, length=lengths[member], chunk=parity.chunk_bytes(lengths)
            )
            for offer in survivors:
                giver = group.index(offer.rank)
                size = parity.contribution_bytes(lengths, member=giver, lost=member, stripe=stripe)
                source = None
                if offer.holder == self.rank:
                    content, kept = (tensor.numpy() for tensor in self._held(offer))
                    part = parity.contribution(content, kept, lengths, member=giver, lost=member, stripe=stripe)
                    source = torch.from_numpy(part)

                def take(begin: int, part: Tensor, start: int = place.start) -> None:
                    parity.xor_into(image[start + begin :], part.numpy())

                self._move(offer.holder, lost, size, source=source, take=take)
        return torch.from_numpy(image) if self.rank == lost else None

    def _move(
        self, giver: int, taker: int, size: int, *, source: Tensor | None, take: Callable[[int, Tensor], None]
    ) -> None:
        """Send bytes from one rank to another, part by part; every other rank returns at once."""
        if self.rank not in (giver, taker):
            return
        assert source is None or source.numel() == size
        scratch = torch.empty(min(size, _AT_ONCE) if source is None else 0, dtype=torch.uint8)
        for begin in range(0, size, _AT_ONCE):
            end = min(begin + _AT_ONCE, size)
            if source is None:
                torch.distributed.recv(scratch[: end - begin], giver, group=self.group)
                take(begin, scratch[: end - begin])
            elif giver == taker:
                take(begin, source[begin:end])
            else:
                torch.distributed.send(source[begin:end], taker, group=self.group)

    def _held(self, offer: Offer) -> tuple[Tensor, Tensor]:
        """Image and parity of a slot on this node."""
        key = (offer.rank, offer.slot)
        if key not in self._mapped:
            folder = self._folder(offer)
            files = [snapshot_files.image_file(folder, offer.slot)]
            files += [snapshot_files.parity_file(folder, offer.slot)] if len(offer.marker.members) > 1 else []
            mapped = [torch.frombuffer(snapshot_files.map_file(file), dtype=torch.uint8) for file in files]
            self._mapped[key] = (mapped[0], mapped[-1])
        return self._mapped[key]

    def _folder(self, offer: Offer) -> Path:
        return self.root / self.generation.folders[offer.rank]
