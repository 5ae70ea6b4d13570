"""Restarts a run from step 0 after all of its checkpoints were lost (`--from-scratch`). No torch."""

from __future__ import annotations

import time
from pathlib import Path

from mmscale.checkpoint.layout import LATEST, SCRATCH, Store
from mmscale.errors import CheckpointError
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EventLog

_PATIENCE_S = 60.0


def check_scratch(store: Store) -> None:
    """Refuse `--from-scratch` if checkpoints exist, or if none could be written.

    Args:
        store: the checkpoints of the run, or of its stage.

    Raises:
        CheckpointError: there are checkpoints, or their folder is a dangling link.
    """
    if there := [*map(str, store.steps()), *store.quarantined()]:
        raise CheckpointError(
            f"{store.root} holds checkpoints ({', '.join(there[-3:])}), and --from-scratch deletes none",
            remedy="continue from them without --from-scratch, or start a new run with another run.name",
        )
    if store.root.is_symlink() and (why := store.lost()):
        raise CheckpointError(why, remedy="mount what it points to, or remove the link")


def start_from_scratch(run: Path, *, first: bool = True) -> None:
    """Record that earlier saves no longer count; does nothing if no checkpoint is missing.

    Args:
        run: the run's folder.
        first: whether this process writes the record; others wait for it.

    Raises:
        CheckpointError: there are checkpoints, or their folder is a dangling link.
    """
    store = Store.of_run(run)
    check_scratch(store)
    deadline = time.monotonic() + _PATIENCE_S
    while not first and store.lost() and time.monotonic() < deadline:
        time.sleep(0.1)
    why = store.lost()
    if not first or not why:
        return
    events = EventLog(run, next_attempt(run))
    events.add(SCRATCH, lost=why)
    events.close()
    (store.root / LATEST).unlink(missing_ok=True)
