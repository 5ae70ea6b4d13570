"""Which step of a run is held in this machine's memory, as a restart would find it. Reads only; no torch."""

from __future__ import annotations

from pathlib import Path

from mmscale.resilience import snapshot_files
from mmscale.resilience.generations import Offer, choose, read_index


def held_step(run: Path, *, above: int, root: Path = snapshot_files.ROOT) -> int | None:
    """The step of the newest snapshot that a restart on this machine would use; None: there is none.

    Digests and the settings of the restart are not compared. Memory of other machines cannot be read from here.

    Args:
        run: the run's folder.
        above: step of the newest checkpoint; only a newer snapshot is used.
        root: folder of the snapshot folders.
    """
    for generation in reversed(read_index(run)):
        offers = []
        for rank, name in enumerate(generation.folders):
            folder = snapshot_files.existing_folder(name, root)
            found = {} if folder is None else snapshot_files.committed(folder)[0]
            offers += [Offer(rank, slot, rank, marker) for slot, marker in found.items()]
        chosen, _ = choose(generation, offers, above=above)
        if chosen is not None:
            return chosen.step
    return None
