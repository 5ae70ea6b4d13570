"""Asynchronous saves from plan to commit: supervised, one at a time, off the critical path.

Training is blocked only for the plan and a fork. Every rank's writer is a forked process; when all of them are done,
another process on rank 0 commits. A failed save is abandoned and training continues. At every step boundary ranks agree
on the state of a save by two numbers in the all-reduce of the stop request (`Saver.status`), without an additional
collective.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import grouped, random_states, write
from mmscale.checkpoint.forked import Forked, Send
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.layout import BEST, INFO, Store, info_text
from mmscale.checkpoint.pending_save import InlineTask, PendingSave, start
from mmscale.checkpoint.save_settings import BestCheckpoint, Provenance, Retention, SaveSettings
from mmscale.checkpoint.shard_files import Content
from mmscale.checkpoint.write import Written
from mmscale.errors import SaveError
from mmscale.runtime import device, groups, random_state

_COMMITTED = "committed"
_TRIES = 2  # number of tries for the last save of an attempt
_GRACE_S = 2.0  # for cleaning up at the end; otherwise the next start does it
_AGREE_S = 5.0  # interval of collectives while all ranks wait, shorter than the timeout of a collective


class Saver:
    """Saves of one attempt; every rank has one and calls it at the same steps.

    Args:
        store: folders of checkpoints.
        settings: how saves are made.
        provenance: metadata stored next to the tensors.
        retention: which checkpoints are kept after a commit.
        on_event: called with events and their fields, on rank 0: "save_begin", "save_committed", "save_failed",
            "save_skipped".
        on_point: called with a place and the step: "save" and "finalize" in the trainer, "write" before every write of
            a writer, "commit" before a commit. Tests inject failures there.

    Attributes:
        verified: steps that were hashed while they were written.
        failures, skipped: abandoned saves, and saves that were due while another one was in progress.
        best: the best checkpoint so far, which is kept and named in every checkpoint; it may be the next one that is
            saved. The owner sets it, the same on every rank.
    """

    def __init__(
        self,
        store: Store,
        *,
        settings: SaveSettings,
        provenance: Provenance,
        retention: Retention,
        on_event: Callable[..., None],
        on_point: Callable[[str, int], None],
    ) -> None:
        self.store = store
        self.settings = settings
        self.provenance = provenance
        self.retention = retention
        self.on_event = on_event
        self.on_point = on_point
        self.verified: set[int] = set()
        self.failures = self.skipped = 0
        self.best: BestCheckpoint | None = None
        self._in_a_row = 0
        self._reason = ""
        self._step_time_saving: float | None = None
        self._planner: write.Planner | None = None
        self._group: grouped.Group | None = None
        self._number = 0
        self._pending: PendingSave | None = None
        self._clearing: list[Forked | InlineTask] = []  # cleaning processes, for which nothing waits
        self._rank = torch.distributed.get_rank()
        self._size = torch.distributed.get_world_size()

    @property
    def under_way(self) -> bool:
        """Whether a save is in progress; the same on every rank."""
        return self._pending is not None

    def waits_before(self, step: int) -> bool:
        """Whether a save of this step, which may not be skipped, waits for the one in progress."""
        best = self.best is not None and self.best.step == step
        return self.under_way and (best or self.retention.is_early(step))

    # --- what the trainer calls -------------------------------------------------------------------------------------

    def save(self, step: int, sharded: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Start a save; wait for its end if it is the last one, or if saves are not asynchronous.

        If another save is in progress, this one is skipped, because queued saves would never catch up. The save of the
        best checkpoint and early saves wait instead.

        Args:
            step: steps done.
            sharded: returns this rank's part of the state.
            last: no training follows, so it must succeed.

        Raises:
            SaveError: the last save failed twice, or too many in a row failed.
        """
        if self._pending is not None and not last and not self.waits_before(step):
            self.skipped += 1
            self._emit("save_skipped", step=step, under_way=self._pending.step)
            return
        self._finish()
        for _ in range(_TRIES if last else 1):
            self._begin(step, sharded)
            if not last and self.settings.asynchronous:
                return
            if self._finish():
                return
        if last:
            raise SaveError(
                f"the last save, of step {step}, failed: {self._reason}", remedy=self._remedy("start it again")
            )
        self._give_up()

    def status(self) -> tuple[int, int]:
        """The state of this rank's part of the save: (in progress, failed); zeros without a save.

        Called once at every step boundary; takes microseconds. Pass the maximum over all ranks to `advance`.
        """
        pending = self._pending
        self._clearing = [task for task in self._clearing if task.poll()]
        if pending is None:
            return 0, 0
        pending.boundaries += 1
        return self._status(pending)

    def advance(self, working: int, failed: int) -> None:
        """Advance the save in progress; every rank calls it with the same numbers.

        Args:
            working: maximum over all ranks of `status`'s first number.
            failed: of its second.

        Raises:
            SaveError: too many saves in a row failed.
        """
        self._advance(working, failed)
        self._give_up()

    def finish(self) -> None:
        """Wait for the save in progress; every rank calls it.

        Raises:
            SaveError: too many saves in a row failed.
        """
        self._finish()
        self._give_up()

    def shorten_deadline(self, within_s: float) -> None:
        """Abandon the save in progress unless it ends soon, because a newer one must be made in little time.

        Args:
            within_s: from now on [seconds].
        """
        if (pending := self._pending) is not None:
            pending.shortened_s = min(pending.shortened_s, time.monotonic() - pending.began + max(0.0, within_s))

    def close(self) -> None:
        """End all processes. Not a collective, so the error path can use it. A save in progress is lost."""
        if self._pending is not None and self._pending.task is not None:
            self._pending.task.kill()
        for task in self._clearing:
            task.wait(timeout_s=_GRACE_S)
            task.kill()
        self._clearing, self._pending = [], None

    def figures(self) -> dict[str, float]:
        """For metrics.jsonl: counts of this attempt, and the mean step time during a save that has just ended."""
        values: dict[str, float] = {"save_failures": self.failures, "saves_skipped": self.skipped}
        if self._step_time_saving is not None:
            values["step_time_saving_s"] = self._step_time_saving
            self._step_time_saving = None
        return values

    # --- a save's life ----------------------------------------------------------------------------------------------

    def _begin(self, step: int, sharded: Callable[[], dict[str, Any]]) -> None:
        began = time.monotonic()
        self._emit("save_begin", step=step)
        self.on_point("save", step)
        self._number += 1
        if self._planner is None:
            self._planner = write.Planner()
            self._group = grouped.agree(self.settings.writers)
        # Before the plan, a collective after which other ranks send: the listener must accept connections by then.
        listener = self._listen(self._group, self._number)
        try:
            plan = self._planner.plan(sharded())
            folder = self.store.temporary(step, self.provenance.attempt, self._number)
            pending = self._pending = PendingSave(step, self._number, folder, plan, began, best=self._best_of(step))
            pending.task = start(
                self._writing(pending, listener), name="the writer", asynchronous=self.settings.asynchronous
            )
        finally:
            if listener is not None:
                listener.close()
        pending.blocked_s += time.monotonic() - began

    def _best_of(self, step: int) -> BestCheckpoint | None:
        """The best checkpoint after the commit of this save; rank 0 writes its name."""
        best = self.best
        if best is None or self._rank != 0 or best.step in (step, *self.store.steps()):
            return best
        return self.store.named_best()  # the save of a better one failed, so the earlier one is still the best

    def _listen(self, group: grouped.Group | None, number: int) -> grouped.Listener | None:
        return grouped.Listener(group, number) if group is not None and group.first == self._rank else None

    def _writing(self, pending: PendingSave, listener: grouped.Listener | None) -> Callable[[Send], Written]:
        """A function that writes this rank's part of a save, for any process that has the memory."""
        plan, step, group = pending.plan, pending.step, self._group
        # Next to the tensors: this rank's random state; megatron-core would keep only one per stage and tensor rank.
        random = random_states.serialize(random_state.capture())
        extra: dict[str, Content] = {}
        if self._rank == 0:
            best = {} if pending.best is None else {BEST: asdict(pending.best)}
            text = info_text({**self.provenance.info, "step": step, **best}).encode()
            extra[INFO] = lambda file: file.write(text)

        def on_write(name: str, size: int) -> None:
            self.on_point("write", step)

        within_s = self.settings.deadline_s
        if group is None:
            return lambda send: write.write(plan, pending.folder, random=random, extra=extra, on_write=on_write)
        if listener is not None:
            return lambda send: write.write_for_group(
                plan, pending.folder, listener, random=random, extra=extra, on_write=on_write, timeout_s=within_s
            )
        return lambda send: write.send_to_group(
            plan, group, pending.number, random=random, on_write=on_write, timeout_s=within_s
        )

    def _finish(self) -> bool:
        """Wait for the save in progress; returns whether it was committed. Each rank waits for its own process only."""
        committed = True
        while (pending := self._pending) is not None:
            if pending.task is not None:
                left = pending.began + min(self.settings.deadline_s, pending.shortened_s) - time.monotonic()
                pending.task.wait(timeout_s=max(0.0, min(left, _AGREE_S)))
            agreed = torch.tensor(self._status(pending), device=device.taken())
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            committed = self._advance(*map(int, agreed.tolist()))
        return committed

    def _status(self, pending: PendingSave) -> tuple[int, int]:
        if pending.task is None or not pending.task.poll():
            pending.problem = pending.task.problem if pending.task is not None else None
            return 0, int(pending.problem is not None)
        limit, rule = min((self.settings.deadline_s, "checkpoint.deadline"), (pending.shortened_s, "--grace of a stop"))
        if time.monotonic() > pending.began + limit:
            doing = "writing" if pending.phase == "write" else "committing"
            pending.problem = f"still {doing} after {limit:.4g} s ({rule})"
        return 1, int(pending.problem is not None)

    def _advance(self, working: int, failed: int) -> bool:
        """Do the next part of the save. False: the save was abandoned."""
        pending, began = self._pending, time.monotonic()
        if pending is None or (working and not failed):
            return True
        if failed:
            return self._abort(pending)
        if pending.phase == "write":
            self._commit(pending)
            pending.blocked_s += time.monotonic() - began
        else:
            self._end(pending)
        return True

    def _commit(self, pending: PendingSave) -> None:
        """All ranks have written: rank 0 gathers their records and starts the commit."""
        assert pending.task is not None
        self.on_point("finalize", pending.step)
        first = self._rank == 0
        parts: list[Any] | None = [None] * self._size if first else None
        torch.distributed.gather_object(pending.task.result, parts)
        pending.phase, pending.task = "commit", None
        if parts is None:
            return
        pending.written = parts
        manifest = CheckpointManifest(
            step=pending.step,
            attempt=self.provenance.attempt,
            config_digest=str(self.provenance.info.get("config_digest", "")),
            code_version=self.provenance.code_version,
            topology=groups.topology(),
            files={name: record for part in parts for name, record in part.files.items()},
        )
        verified = {*self.verified, pending.step}
        # The best one when this save began; a better one that was found since then is not committed yet.
        spared = () if pending.best is None else (pending.best.step,)

        def work(send: Send) -> None:
            self.store.passed("write")
            self.on_point("commit", pending.step)
            index = write.write_index(
                pending.plan, parts, pending.folder, on_write=lambda *_: self.on_point("write", pending.step)
            )
            manifest.files.update(index)
            self.store.passed("index")
            self.store.commit(manifest, number=pending.number)
            send(_COMMITTED)
            self.store.prune(self.retention.keep, permanent=self.retention.keeps, verified=verified, spared=spared)

        pending.task = start(work, name="the commit", asynchronous=self.settings.asynchronous)

    def _end(self, pending: PendingSave, *, problem: str = "") -> None:
        seconds = time.monotonic() - pending.began
        self._pending, self._in_a_row = None, 0
        self.verified.add(pending.step)
        fields: dict[str, Any] = {"problem": problem} if problem else {}
        if pending.boundaries > 1:
            self._step_time_saving = (seconds - pending.blocked_s) / pending.boundaries
            fields["step_time_s"] = round(self._step_time_saving, 4)
        records = [record for part in pending.written for record in part.files.values()]
        self._emit(
            "save_committed",
            step=pending.step,
            seconds=round(seconds, 3),
            blocked_s=round(pending.blocked_s, 4),
            bytes=sum(record.size for record in records),
            hash_s=round(max((part.hash_s for part in pending.written), default=0.0), 4),
            **fields,
        )

    def _abort(self, pending: PendingSave) -> bool:
        """A rank's part failed, so all ranks abandon this save. True if it was committed nevertheless."""
        committed = False
        if pending.task is not None:
            if pending.problem is None and not pending.task.poll():
                pending.problem = pending.task.problem
            if not pending.task.kill():
                self._clearing.append(pending.task)
            committed = _COMMITTED in pending.task.messages
        found = groups.gathered((pending.problem, committed))
        problems = {rank: problem for rank, (problem, _) in enumerate(found) if problem is not None}
        if any(committed for _, committed in found):  # the commit succeeded; only the cleaning up failed
            self._end(pending, problem=next(iter(problems.values()), ""))
            return True
        first_hand = {rank: why for rank, why in problems.items() if not why.startswith(grouped.ELSEWHERE)}
        rank, reason = next(iter((first_hand or problems).items()))
        if not first_hand:  # the rank that failed first may not know of its own failure yet
            rank, reason = grouped.origin(reason) or (rank, reason)
        self._pending = None
        self.failures += 1
        self._in_a_row += 1
        self._reason = f"rank {rank}: {reason}"
        self._emit(
            "save_failed",
            step=pending.step,
            rank=rank,
            reason=reason,
            ranks=sorted(problems),
            seconds=round(time.monotonic() - pending.began, 3),
            in_a_row=self._in_a_row,
        )
        if self._rank == 0:
            self._remove(pending.folder)
        return False

    def _remove(self, folder: Path) -> None:
        """Try to remove a folder, in another process: if writing hangs, removing may hang too."""

        def work(send: Send) -> None:
            shutil.rmtree(folder, ignore_errors=True)

        if self.settings.asynchronous:
            self._clearing.append(Forked(work, name="the removal"))
        else:
            work(lambda _: None)

    def _give_up(self) -> None:
        if self._in_a_row >= self.settings.max_failures:
            raise SaveError(
                f"{self._in_a_row} saves in a row failed, the last one on {self._reason}",
                remedy=self._remedy("start it again: it resumes from the newest checkpoint"),
            )

    def _remedy(self, then: str) -> str:
        return f"make sure that {self.store.root} can be written (space, quota, mount), then {then}"

    def _emit(self, event: str, **fields: Any) -> None:
        if self._rank == 0:
            self.on_event(event, **fields)
