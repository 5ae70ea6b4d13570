"""Manages the checkpoints of one run: when to save, which to keep, and which to load (the newest intact one).

The caller passes the state. layout.py defines paths, integrity.py digests, saving.py the steps of a save. Every rank
calls every method, and all ranks return or raise alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from mmscale.checkpoint import integrity, random_states, sharded
from mmscale.checkpoint.integrity import CheckpointManifest, DamagedError, NoManifestError
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.save_settings import Provenance, Retention, SaveSettings
from mmscale.checkpoint.saving import Saver
from mmscale.checkpoint.shape import WEIGHTS
from mmscale.checkpoint.tensors import TensorEntry
from mmscale.errors import CheckpointError
from mmscale.runtime import groups, random_state

_ALLOW = "or set checkpoint.allow_missing=true to continue without"
T = TypeVar("T")


def _nothing(place: str, step: int) -> None:
    """The usual `on_point`."""


class Saveable(Protocol):
    """State that can be converted to a sharded state dict and back."""

    step: int

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """This rank's part."""

    def restore(self, loaded: dict[str, Any]) -> None:
        """Restore the state from what was read."""


@runtime_checkable
class HasWeights(Protocol):
    """State that can start from a checkpoint without optimizer state, which `restore` then does not get."""

    def sharded_weights(self) -> dict[str, Any]:
        """This rank's part of the model."""


@runtime_checkable
class HasTypes(Protocol):
    """State that can read tensors of other types than it writes: `expect` is called before `sharded`."""

    def expect(self, stored: Mapping[str, TensorEntry]) -> None:
        """The tensors of the checkpoint that will be read."""


class CheckpointManager:
    """The checkpoints of a run; every rank has one and calls it at the same steps.

    Args:
        run: the run's folder.
        every: save every n steps; 0: only on request.
        keep: newest checkpoints kept.
        attempt: number of this attempt; names temporary folders.
        info: metadata stored next to the tensors, plain JSON; `config_digest` goes into the manifest too.
        on_event: called with events and their fields, on rank 0: Saver's, "checkpoint_bad", "checkpoint_unverified",
            "optimizer_fresh", "random_state_fresh".
        saves: how saves are made; by default the trainer writes them itself.
        on_point: as for Saver.
        check: as for Store; an exception that it raises makes the save fail.
        keep_every: checkpoints of every n-th step are kept permanently; 0: none.
        early: steps 1, 2, 4, ... up to this one are saved too, and kept permanently; 0: none.
        allow_missing: whether a checkpoint may lack its manifest, its counters or random states.
        seed: seeds new random states if the saved ones belong to another layout.
        code_version: goes into the manifest.
        default_progress: counters for a checkpoint of a step that lacks them, with allow_missing.

    Attributes:
        saver: saves of this attempt.
    """

    def __init__(
        self,
        run: Path,
        *,
        every: int,
        keep: int,
        attempt: int,
        info: dict[str, Any],
        on_event: Callable[..., None],
        saves: SaveSettings | None = None,
        on_point: Callable[[str, int], None] = _nothing,
        check: Callable[[], None] | None = None,
        keep_every: int = 0,
        early: int = 0,
        allow_missing: bool = False,
        seed: int = 0,
        code_version: str = "",
        default_progress: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self.store = replace(Store.of_run(run), check=check)
        self.every = every
        self.on_event = on_event
        self.allow_missing = allow_missing
        self.seed = seed
        self.default_progress = default_progress
        self.saver = Saver(
            self.store,
            settings=saves or SaveSettings(),
            provenance=Provenance(attempt, info, code_version),
            retention=Retention(keep, keep_every, early),
            on_event=on_event,
            on_point=on_point,
        )
        self._let_through: set[int] = set()  # checkpoints without a manifest, accepted by allow_missing
        self._rank = torch.distributed.get_rank()
        self._size = torch.distributed.get_world_size()
        self._first = self._rank == 0

    @property
    def verified(self) -> set[int]:
        """Steps that this attempt hashed while it wrote them, or verified."""
        return self.saver.verified

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step, or it is the best one so far."""
        scheduled = (self.every > 0 and step % self.every == 0) or self.saver.retention.is_early(step)
        best = self.saver.best
        return scheduled or (best is not None and best.step == step)

    def move(self, run: Path) -> None:
        """Save into another folder from now on, because the run's folder was renamed. A save in progress fails."""
        self.store = self.saver.store = replace(self.store, root=Store.of_run(run).root)

    # --- save -------------------------------------------------------------------------------------------------------

    def save(self, state: Saveable, *, last: bool = False) -> None:
        """Start a save, or complete it if saves are not asynchronous; waits for the last one.

        Args:
            state: the state to save, as it is now.
            last: no training follows, so it must succeed.

        Raises:
            SaveError: the last save failed twice, or too many in a row failed. Committed checkpoints stay valid.
        """
        self.saver.save(state.step, lambda: state.sharded(loading=False), last=last)

    # --- load -------------------------------------------------------------------------------------------------------

    def choose(self) -> int | None:
        """The newest intact checkpoint, or None if there has never been one. Damaged ones are renamed to `.bad`.

        Raises:
            CheckpointError: there are checkpoints and none is intact; or one has no manifest, or it is world-writable.
        """
        self.saver.finish()  # a save in progress must not be swept away
        self._on_first(self.store.sweep)
        while (step := self._on_first(self.store.newest)) is not None:
            problems = self.problems(step)
            if not problems:
                self._on_first(self.store.point_to_newest)
                return step
            bad = self._on_first(functools.partial(self.store.quarantine, step))
            self._emit("checkpoint_bad", step=step, kept_as=bad.name, problems=problems[:20])
        return None

    def problems(self, step: int) -> list[str]:
        """The problems of a checkpoint, found by all ranks together and confirmed by two reads; empty if it is intact.

        Raises:
            CheckpointError: it has no manifest, it is world-writable, or the storage fails, which is not damage.
        """
        folder = self.store.path(step)
        manifest, problems = self._on_first(lambda: self._inspect(step))
        if manifest is None or problems:
            self._let_through |= set() if problems else {step}
            return list(problems)
        sizes = {name: record.size for name, record in manifest.files.items()}
        mine = integrity.deal(sizes, self._size)[self._rank]
        found = [line for part in self._on_all(lambda: integrity.content(folder, manifest, mine)) for line in part]
        if not found:
            self.verified.add(step)
            return []
        # The second read is done by other ranks, on other nodes if there are several, because the storage of one node
        # may be at fault.
        theirs = integrity.deal(sizes, self._size)[(self._rank + max(1, self._size // 2)) % self._size]
        again = [line for part in self._on_all(lambda: integrity.content(folder, manifest, theirs)) for line in part]
        if sorted(again) != sorted(found):
            raise CheckpointError(
                f"ranks disagree about {folder}: {integrity.describe(found or again)} on one and not on another",
                remedy="check memory and storage of the nodes; the checkpoint may well be whole",
            )
        return found

    def _inspect(self, step: int) -> tuple[CheckpointManifest | None, list[str]]:
        folder = self.store.path(step)
        integrity.refuse_world_writable(folder)
        try:
            manifest = integrity.read_manifest(folder)
        except NoManifestError as error:
            if self.store.promises_manifest(step):
                return None, [str(error)]
            if not self.allow_missing:
                raise CheckpointError(
                    f"{folder} has no {integrity.MANIFEST}, so it cannot be verified",
                    remedy=f"choose a run that has one, {_ALLOW}",
                ) from None
            self.on_event("checkpoint_unverified", step=step)
            return None, []
        except DamagedError as error:
            return None, [str(error)]
        if manifest.step != step:
            return None, [f"{integrity.MANIFEST} belongs to step {manifest.step}"]
        return manifest, integrity.structure(folder, manifest)

    def load(self, state: Saveable, step: int) -> None:
        """Read a committed checkpoint into the state, and restore its random numbers.

        Raises:
            CheckpointError: it is damaged or incomplete.
        """
        if step not in self.verified | self._let_through and (problems := self.problems(step)):
            raise CheckpointError(
                f"{self.store.path(step)} is damaged: {integrity.describe(problems)}",
                remedy="choose another checkpoint: RUN@STEP",
            )
        folder = self.store.path(step)
        # Read once, because the size of the index grows with the number of ranks that wrote it.
        there = sharded.stored(folder)
        loaded = sharded.read(folder, self._wanted(state, step, there), there=there)
        if "progress" not in loaded:
            self._refuse_missing(step, "its counters (progress)")
            loaded["progress"] = self.default_progress(step) if self.default_progress else {"step": step}
        state.restore(loaded)
        self._restore_random_state(step)

    def _wanted(self, state: Saveable, step: int, there: Mapping[str, TensorEntry]) -> dict[str, Any]:
        if not self._on_first(lambda: self._holds_weights_only(step)):
            if isinstance(state, HasTypes):
                state.expect(there)
            return state.sharded(loading=True)
        self._refuse_missing(step, "the optimizer's state: it holds weights only")
        self._emit("optimizer_fresh", step=step)
        # `sharded(loading=True)` would fill the state of megatron's optimizers with uninitialized memory.
        return state.sharded_weights() if isinstance(state, HasWeights) else state.sharded(loading=True)

    def _holds_weights_only(self, step: int) -> bool:
        try:
            return self.store.info(step).get("contents") == WEIGHTS
        except CheckpointError:  # with allow_missing it may not exist
            return False

    def _restore_random_state(self, step: int) -> None:
        folder = self.store.path(step)
        saved = self._on_first(lambda: _topology(folder))
        if saved == groups.topology():
            mine = None

            def read() -> bool:
                nonlocal mine
                mine = random_states.read(folder, self._rank)
                return mine is not None

            states = self._on_all(read)
            if all(states):
                assert mine is not None
                random_state.restore(mine)
                return
            missing = f"{states.count(False)} of {self._size} ranks ({random_states.FOLDER}/)"
            self._refuse_missing(step, f"the random state of {missing}")
        random_state.reseed(self.seed, step)
        self._emit("random_state_fresh", step=step, saved_topology=saved, topology=groups.topology())

    def _refuse_missing(self, step: int, what: str) -> None:
        if not self.allow_missing:
            raise CheckpointError(
                f"{self.store.path(step)} lacks {what}", remedy=f"choose an older checkpoint, {_ALLOW}"
            )

    # --- all ranks alike --------------------------------------------------------------------------------------------

    def _emit(self, event: str, **fields: Any) -> None:
        if self._first:
            self.on_event(event, **fields)

    def _on_first(self, action: Callable[[], T]) -> T:
        """Rank 0's result on every rank, because a shared file system may show other ranks an older state."""
        return self._on_all(lambda: action() if self._first else None)[0]  # type: ignore[return-value]

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result on every rank. If one rank fails, all fail, so that none continues or waits for ever."""
        result: T | None = None
        failure: CheckpointError | None = None
        try:
            result = action()
        except CheckpointError as error:
            failure = error
        except (OSError, DamagedError) as error:
            failure = CheckpointError(f"rank {self._rank}: {error}", remedy="check the file system of the run folder")
        gathered = groups.gathered((result, failure and (failure.cause, failure.remedy)))
        for _, failed in gathered:
            if failed is not None:
                raise CheckpointError(failed[0], remedy=failed[1])
        return [found for found, _ in gathered]


def _topology(folder: Path) -> dict[str, int] | None:
    """Ranks of each dimension with which a checkpoint was saved; older ones have no entry for cp."""
    try:
        found = integrity.read_manifest(folder).topology
        return {**found, "cp": found.get("cp", 1)} if found else found
    except DamagedError:
        return None
