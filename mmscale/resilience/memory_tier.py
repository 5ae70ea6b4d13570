"""Snapshots of every rank's state in shared memory, taken every few steps by the trainer and kept by guards.

There are two slots: one is written while the other holds the newest committed snapshot, so at any moment there is a
step that all ranks have. The trainer is blocked only for a copy at the speed of memory; the guard (guard.py) does
hashing, parity and commit. train/state/local_state.py defines the state. Every rank calls every method except `close`
and `forget`, and all of them return the same result.

If the tier cannot work (no space, a dead guard) it reports that once and turns itself off. It never ends a run.
"""

from __future__ import annotations

import json
import logging
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale import bounded
from mmscale.resilience import generations, guard, parity, snapshot_files, state_image
from mmscale.resilience.generations import Generation
from mmscale.resilience.guard_link import GuardLink, own_address
from mmscale.resilience.restore import Recovery
from mmscale.resilience.snapshot_files import UnusableError
from mmscale.runtime import host_memory
from mmscale.runtime.groups import gathered
from mmscale.runtime.rank_env import RankEnv

_log = logging.getLogger(__name__)
_SPARE = 0.1  # share of the file system that stays free: NCCL and loader processes need shared memory too
_MOST_REASONS = 20  # in an event; thousands of ranks may have one each

Accept = Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[str]]


@dataclass
class Statistics:
    """Of the newest snapshot; seconds.

    Attributes:
        bytes: of this rank's image.
        copy_s: time that the copy blocked the trainer.
        digest_s, exchange_s: time in which the guard hashed it; sent it and received parity.
        taken, skipped: snapshots so far; snapshots skipped because the previous one was not yet committed.
    """

    bytes: int = 0
    copy_s: float = 0.0
    digest_s: float = 0.0
    exchange_s: float = 0.0
    taken: int = 0
    skipped: int = 0


class MemoryTier:
    """The snapshots in memory of one attempt, and those left by a former attempt.

    Args:
        run: the run's folder, which contains the index.
        env: place of this rank.
        group: all ranks, on the host (gloo).
        every: take a snapshot every n steps; 0: never, and remaining snapshots are removed.
        group_size: ranks of a parity group.
        hold_s: how long a guard keeps its folder after its trainer's death [seconds].
        attempt: number of this attempt.
        identity: properties that must be equal for an exact restart, JSON.
        on_event: called with "memory_restored", "memory_refused", "memory_off" and their fields, on rank 0.
        timeout_s: how long guards may take for one snapshot [seconds].
        root: where folders are created.
    """

    def __init__(
        self,
        run: Path,
        *,
        env: RankEnv,
        group: ProcessGroup,
        every: int,
        group_size: int,
        hold_s: float,
        attempt: int,
        identity: Mapping[str, Any],
        on_event: Callable[..., None],
        timeout_s: float = 300.0,
        root: Path = snapshot_files.ROOT,
    ) -> None:
        self.run = run
        self.env = env
        self.group = group
        self.every = every
        self.group_size = group_size
        self.hold_s = hold_s
        self.attempt = attempt
        self.identity: dict[str, Any] = bounded.parse_json(json.dumps(identity))
        self.on_event = on_event
        self.timeout_s = timeout_s
        self.root = root
        self.statistics = Statistics()
        self.generation: Generation | None = None  # this attempt's; None: not started, or off
        self._left = self._everywhere(lambda: generations.read_index(run))  # of former attempts
        self._recovery: Recovery | None = None  # keeps the mapping of the restored image
        self._link: GuardLink | None = None
        self._addresses: list[tuple[str, int]] = []
        self._nodes: list[str] = []
        self._plan: state_image.ImagePlan | None = None
        self._lengths: list[int] = []  # of all ranks' images
        self._epoch = 0  # counts changes of these
        self._ready: dict[int, int] = {}  # slot -> epoch for which its files were created
        self._buffers: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def _everywhere(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result on every rank."""
        box = [action() if self.env.rank == 0 else None]
        torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        return gathered(value, group=self.group)

    def _emit(self, event: str, **fields: Any) -> None:
        if self.env.rank == 0:
            self.on_event(event, **fields)

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a snapshot after this step."""
        return self.every > 0 and step % self.every == 0

    # --- what a former attempt left ---------------------------------------------------------------------------------

    def restore(self, *, above: int, accept: Accept) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest snapshot of a former attempt, if any: its step, this rank's tensors and plain values.

        The tensors may be views of shared memory, valid until the next snapshot: copy them.

        Args:
            above: step of the newest intact checkpoint; only a newer snapshot is used.
            accept: describes what does not fit this run; called on every rank before any of them continues.
        """
        began = time.monotonic()
        for generation in reversed(self._left if self.every else []):
            differing = [key for key, value in self.identity.items() if generation.identity.get(key) != value]
            if differing:
                self._refuse(generation, [f"{' and '.join(differing)} changed"])
                continue
            recovery = Recovery(generation, group=self.group, root=self.root)
            found, reasons = recovery.recover(above=above)
            if found is None:
                self._refuse(generation, reasons)
                continue
            tensors: dict[str, Tensor] = {}
            plain: dict[str, Any] = {}
            try:
                tensors, plain = state_image.read(found.image)
                mine = accept(tensors, plain)
            except UnusableError as error:
                mine = [str(error)]
            refusals = [f"rank {rank}: {text}" for rank, texts in enumerate(self._gather(mine)) for text in texts]
            if refusals:
                self._refuse(generation, refusals)
                continue
            self._recovery = recovery
            self._emit(
                "memory_restored",
                step=found.step,
                of_attempt=generation.attempt,
                rebuilt=list(found.lost),
                refused=reasons[:_MOST_REASONS],
                seconds=round(time.monotonic() - began, 3),
                rebuild_s=round(found.rebuild_s, 3),
            )
            return found.step, tensors, plain
        return None

    def _refuse(self, generation: Generation, reasons: list[str]) -> None:
        self._emit("memory_refused", reasons=reasons[:_MOST_REASONS], of_attempt=generation.attempt)

    def discard(self) -> None:
        """End the guards of former attempts and free their memory, also if no guard is left."""
        self._recovery = None
        for generation in self._left:
            for name in generation.folders:
                folder = snapshot_files.existing_folder(name, self.root)
                if folder is not None and not guard.end(folder):
                    _log.warning("%s belongs to a process that is still training", folder)
        if self._left and self.env.rank == 0:
            generations.write_index(self.run, [self.generation] if self.generation else [])
        self._left = []

    # --- start and end ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start this attempt's guards. The restored snapshot is kept until the first own snapshot is committed."""
        if self._recovery is None:
            self.discard()
        if not self.every:
            return
        token = self._everywhere(lambda: secrets.token_bytes(32))
        name = self._everywhere(lambda: secrets.token_hex(16))
        self._nodes = self._gather(platform.node())
        address = own_address(self.env, self._nodes)
        problem = ""
        try:
            self._link = GuardLink(self.root, address=address, token=token, hold_s=self.hold_s)
        except (OSError, UnusableError) as error:
            problem = f"no guard could be started: {error}"
        here = (self._link.folder.name, address, self._link.port) if self._link else ("", "", 0)
        everyone = self._gather((problem, here))
        if self._off([problem for problem, _ in everyone]):
            return
        self._addresses = [(host, port) for _, (_, host, port) in everyone]
        self.generation = Generation(
            name=name,
            attempt=self.attempt,
            identity=self.identity,
            groups=tuple(parity.groups_of(self._nodes, size=self.group_size)),
            folders=tuple(folder for _, (folder, _, _) in everyone),
        )
        if self.env.rank == 0:
            generations.write_index(self.run, [*self._left, self.generation])

    def close(self) -> None:
        """End the guards and free all memory, because the run is finished or saved on disk. No collective.

        A rank that dies does not get here, and its guard keeps its folder for a while.
        """
        self._buffers.clear()
        if self._link is not None:
            self._link.finish()
            self._link = None
        self.generation = None
        self.discard()
        if self.env.rank == 0:
            generations.write_index(self.run, [])

    def _off(self, problems: list[str]) -> bool:
        """Turn the tier off on all ranks if any of them has a problem; returns whether it is off."""
        found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
        if not found:
            return False
        self._emit("memory_off", reasons=found[:_MOST_REASONS])
        self.close()
        self.every = 0
        return True

    # --- snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> bool:
        """Copy this rank's state into shared memory and leave the rest to the guard.

        Args:
            step: optimizer steps done.
            tensors: state of this rank, on any device; with other names or shapes than before, memory is laid out
                again.
            plain: further state, JSON.

        Returns:
            Whether it was taken: not while an earlier one is not committed everywhere, and not when the tier is off.
        """
        link = self._link
        if link is None:
            return False
        began = time.perf_counter()
        link.listen()
        slot = (self.statistics.taken + 1) % len(snapshot_files.SLOTS)
        overdue = link.pending_s > self.timeout_s
        if overdue and not link.problem:
            link.problem = f"the guard has not committed a snapshot for {self.timeout_s:.0f} s"
        fits = self._plan is not None and self._plan.fits(tensors, plain)
        failed, busy, unready = self._any(bool(link.problem), link.pending_s > 0, not fits or not self._is_ready(slot))
        if failed:
            self._off(self._gather(link.problem))
            return False
        if busy:
            self.statistics.skipped += 1
            return False
        if self.statistics.taken and self._left:
            self.discard()  # every rank's first own snapshot is committed
        if unready:
            if not fits:
                self._plan = state_image.make_plan(tensors, plain)
            if not self._prepare(slot):
                return False
        assert self._plan is not None
        buffer, views = self._buffers[slot]
        snapshot_files.uncommit(link.folder, slot)
        self._plan.write(buffer, views, tensors, plain)
        self.statistics.taken += 1
        link.order_snapshot(serial=self.statistics.taken, slot=slot, step=step, length=self._plan.length)
        self.statistics.bytes = self._plan.length
        self.statistics.copy_s = time.perf_counter() - began
        self._recall(link)
        _log.debug("snapshot of step %d: blocked for %.1f ms", step, 1e3 * self.statistics.copy_s)
        return True

    def wait(self, *, timeout_s: float = 60.0) -> bool:
        """Wait until this rank's guard has committed the snapshot; False if it did not. No collective."""
        if self._link is None:
            return False
        self._link.listen(until_committed_s=timeout_s)
        self._recall(self._link)
        return self._link.pending_s == 0 and not self._link.problem

    def forget(self) -> None:
        """Invalidate the snapshots so far, because the run has rolled back. No collective."""
        if self._link is not None:
            self._link.listen(until_committed_s=self.timeout_s)
            for slot in snapshot_files.SLOTS:
                snapshot_files.uncommit(self._link.folder, slot)

    def _recall(self, link: GuardLink) -> None:
        self.statistics.digest_s = link.last.get("digest_s", 0.0)
        self.statistics.exchange_s = link.last.get("exchange_s", 0.0)

    def _any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        values = torch.tensor([int(flag) for flag in flags])
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return [bool(value) for value in values.tolist()]

    def _is_ready(self, slot: int) -> bool:
        return self._ready.get(slot) == self._epoch

    def _prepare(self, slot: int) -> bool:
        """Create the files of a slot for the present image sizes, on all ranks, before any guard sends."""
        assert self._plan is not None and self._link is not None and self.generation is not None
        lengths = self._gather(self._plan.length)
        changed, self._lengths = lengths != self._lengths, lengths
        self._epoch += int(changed)
        members = self.generation.group_of(self.env.rank)
        chunk = parity.chunk_bytes([lengths[member] for member in members])
        folder = self._link.folder
        files = {snapshot_files.image_file(folder, slot): self._plan.length}
        if chunk:
            files[snapshot_files.parity_file(folder, slot)] = chunk
        if self._left and self._no_space(chunk):
            self.discard()  # a new snapshot is preferred to an old one
            self._gather(None)  # by all ranks, before any of them checks again
        problem = self._no_space(chunk)
        if not problem:
            try:
                self._buffers.pop(slot, None)
                snapshot_files.uncommit(folder, slot)
                for file, size in files.items():
                    snapshot_files.allocate(file, size)
                mapped = snapshot_files.map_file(snapshot_files.image_file(folder, slot), writable=True)
                buffer = torch.frombuffer(mapped, dtype=torch.uint8)
                self._buffers[slot] = (buffer, self._plan.views(buffer))
                self._ready[slot] = self._epoch
            except (OSError, UnusableError) as error:
                problem = f"{self.root}: {error}"
        if self._off(self._gather(problem)):
            return False
        if changed:
            self._link.order(
                "group",
                generation=self.generation.name,
                attempt=self.attempt,
                epoch=self._epoch,
                rank=self.env.rank,
                members=members,
                me=members.index(self.env.rank),
                addresses=[self._addresses[member] for member in members],
                chunk=chunk,
                timeout_s=self.timeout_s,
            )
        return True

    def _no_space(self, chunk: int) -> str:
        """Describes a lack of space if this node's ranks together need more for their slots than there is.

        Every rank calls it.

        Args:
            chunk: bytes of this rank's parity.
        """
        assert self._plan is not None and self._link is not None
        folder, slots = self._link.folder, snapshot_files.SLOTS
        files = [
            make(folder, slot) for slot in slots for make in (snapshot_files.image_file, snapshot_files.parity_file)
        ]
        there = sum(file.stat().st_blocks * 512 for file in files if file.exists())
        free, whole = snapshot_files.free_bytes(self.root)
        left = min(free - int(_SPARE * whole), host_memory.available())
        wanted = self._gather(len(slots) * (self._plan.length + chunk) - there)
        needed = sum(want for want, node in zip(wanted, self._nodes, strict=True) if node == self._nodes[self.env.rank])
        problem = f"this node's ranks need {needed >> 20} MiB of {self.root}, {max(0, left) >> 20} MiB can be taken"
        return next((text for text in self._gather(problem if needed > left else "") if text), "")
