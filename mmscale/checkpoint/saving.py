"""A save from its plan to its commit: off the critical path, supervised, one at a time.

Training waits only for the plan and a fork. Every rank's writer is a forked process; when all of them are done, another
one on rank 0 commits. A save that fails is given up and training goes on. Ranks agree on where a save stands at the
border of a step, by two numbers that travel with the request to stop (`word`), so that no step costs a collective more.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mmscale.checkpoint import grouped, random_states, write
from mmscale.checkpoint.forked import Forked, Tell
from mmscale.checkpoint.integrity import Manifest
from mmscale.checkpoint.layout import INFO, Store, info_text
from mmscale.checkpoint.pickles import METADATA
from mmscale.checkpoint.save_settings import Provenance, Retention, SaveSettings
from mmscale.checkpoint.write import Plan, Written
from mmscale.errors import MmscaleError, SaveError
from mmscale.runtime import device, groups, random_state

_COMMITTED = "committed"
_TRIES = 2  # of the last save of an attempt
_GRACE_S = 2.0  # for what clears up at the end; the next start does it otherwise
_AGREE_S = 5.0  # between two collectives while all ranks wait: they must not wait longer than one may take


@dataclass
class _Here:
    """Work that was done in this process, as a Forked that has ended."""

    result: Any = None
    problem: str | None = None
    messages: list[Any] = field(default_factory=list)

    def poll(self) -> bool:
        return False

    def wait(self, *, timeout_s: float) -> bool:
        return True

    def kill(self, *, timeout_s: float = 1.0) -> bool:
        return True


@dataclass
class _Flight:
    """The save that is under way."""

    step: int
    number: int
    folder: Path
    plan: Plan
    began: float
    task: Forked | _Here | None = None
    phase: Literal["write", "commit"] = "write"
    hurried_s: float = math.inf  # given up after this time, if that is before the deadline
    borders: int = 0  # steps trained meanwhile
    blocked_s: float = 0.0
    written: list[Written] = field(default_factory=list)
    problem: str | None = None


class Saver:
    """Saves of one attempt; every rank holds one and calls it at the same steps.

    Args:
        store: where checkpoints stand.
        settings: how saves are made.
        provenance: what is stored beside the tensors.
        retention: what is kept when one more is committed.
        on_event: told events with their fields, on rank 0: "save_begin", "save_committed", "save_failed",
            "save_skipped".
        on_point: told a place and the step there: "save" and "finalize" in the trainer, "write" before every write of
            a writer, "commit" before a commit. Tests fail there.

    Attributes:
        verified: steps that were hashed while they were written.
        failures, skipped: saves given up, and saves due while another one was under way.
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
        self._in_a_row = 0
        self._reason = ""
        self._step_time_saving: float | None = None
        self._planner: write.Planner | None = None
        self._group: grouped.Group | None = None
        self._number = 0
        self._flight: _Flight | None = None
        self._clearing: list[Forked | _Here] = []  # processes that nobody waits for
        self._rank = torch.distributed.get_rank()
        self._size = torch.distributed.get_world_size()

    @property
    def under_way(self) -> bool:
        """Whether a save has begun and not ended: the same on every rank."""
        return self._flight is not None

    # --- what the trainer calls -------------------------------------------------------------------------------------

    def save(self, step: int, sharded: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Begin a save; wait for its end if it is the last one, or if saves are not asynchronous.

        A save that is due while another one is under way is left out: queued ones would never catch up.

        Args:
            step: steps done.
            sharded: gives this rank's part of the state.
            last: nothing is trained after it, so it must succeed.

        Raises:
            SaveError: the last save failed twice, or too many in a row did.
        """
        if self._flight is not None and not last:
            self.skipped += 1
            self._tell("save_skipped", step=step, under_way=self._flight.step)
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

    def word(self) -> tuple[int, int]:
        """Where this rank's part of the save stands: (at work, failed), zeros if nothing is under way.

        Called once at the border of every step, it costs microseconds. The maximum over all ranks is for `advance`.
        """
        flight = self._flight
        self._clearing = [task for task in self._clearing if task.poll()]
        if flight is None:
            return 0, 0
        flight.borders += 1
        return self._word(flight)

    def advance(self, working: int, failed: int) -> None:
        """Go on with the save that is under way; every rank calls it with the same numbers.

        Args:
            working: maximum over all ranks of `word`'s first number.
            failed: of its second.

        Raises:
            SaveError: too many saves in a row failed.
        """
        self._advance(working, failed)
        self._give_up()

    def finish(self) -> None:
        """Wait until nothing is under way; every rank calls it.

        Raises:
            SaveError: too many saves in a row failed.
        """
        self._finish()
        self._give_up()

    def hurry(self, within_s: float) -> None:
        """Give up the save that is under way unless it ends soon: a newer one has to be made in little time.

        Args:
            within_s: from now on [seconds].
        """
        if (flight := self._flight) is not None:
            flight.hurried_s = min(flight.hurried_s, time.monotonic() - flight.began + max(0.0, within_s))

    def close(self) -> None:
        """End all processes. Not a collective: also for the error path. What was under way is lost."""
        if self._flight is not None and self._flight.task is not None:
            self._flight.task.kill()
        for task in self._clearing:
            task.wait(timeout_s=_GRACE_S)
            task.kill()
        self._clearing, self._flight = [], None

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
        self._tell("save_begin", step=step)
        self.on_point("save", step)
        self._number += 1
        if self._planner is None:
            self._planner = write.Planner()
            self._group = grouped.agree(self.settings.writers)
        # Before the plan, in which ranks wait for each other: then it listens when the others send.
        listener = self._listen(self._group, self._number)
        try:
            plan = self._planner.plan(sharded())
            folder = self.store.temporary(step, self.provenance.attempt, self._number)
            flight = self._flight = _Flight(step, self._number, folder, plan, began)
            flight.task = self._start(self._writing(flight, listener), name="the writer")
        finally:
            if listener is not None:
                listener.close()
        flight.blocked_s += time.monotonic() - began

    def _listen(self, group: grouped.Group | None, number: int) -> grouped.Listener | None:
        return grouped.Listener(group, number) if group is not None and group.first == self._rank else None

    def _writing(self, flight: _Flight, listener: grouped.Listener | None) -> Callable[[Tell], Written]:
        """This rank's part of a save, to be done in any process that has the memory."""
        plan, step, group = flight.plan, flight.step, self._group
        # Beside the tensors: this rank's random state, of which megatron-core would keep one per stage and tensor rank.
        random = random_states.serialize(random_state.capture())
        beside: dict[str, Callable[[Any], None]] = {}
        if self._rank == 0:
            text = info_text({**self.provenance.info, "step": step}).encode()
            beside[INFO] = lambda file: file.write(text)

        def on_write(name: str, size: int) -> None:
            self.on_point("write", step)

        within_s = self.settings.deadline_s
        if group is None:
            return lambda tell: write.write(plan, flight.folder, random=random, beside=beside, on_write=on_write)
        if listener is not None:
            return lambda tell: write.write_for_group(
                plan, flight.folder, listener, random=random, beside=beside, on_write=on_write, timeout_s=within_s
            )
        return lambda tell: write.send_to_group(
            plan, group, flight.number, random=random, on_write=on_write, timeout_s=within_s
        )

    def _start(self, work: Callable[[Tell], Any], *, name: str) -> Forked | _Here:
        if self.settings.asynchronous:
            return Forked(work, name=name)
        here = _Here()
        try:
            here.result = work(here.messages.append)
        except OSError as error:
            here.problem = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        except MmscaleError as error:
            here.problem = error.cause
        return here

    def _finish(self) -> bool:
        """Wait for the save that is under way; whether it was committed. Each rank waits for its own process only."""
        committed = True
        while (flight := self._flight) is not None:
            if flight.task is not None:
                left = flight.began + min(self.settings.deadline_s, flight.hurried_s) - time.monotonic()
                flight.task.wait(timeout_s=max(0.0, min(left, _AGREE_S)))
            agreed = torch.tensor(self._word(flight), device=device.taken())
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            committed = self._advance(*map(int, agreed.tolist()))
        return committed

    def _word(self, flight: _Flight) -> tuple[int, int]:
        if flight.task is None or not flight.task.poll():
            flight.problem = flight.task.problem if flight.task is not None else None
            return 0, int(flight.problem is not None)
        limit, rule = min((self.settings.deadline_s, "checkpoint.deadline"), (flight.hurried_s, "--grace of a stop"))
        if time.monotonic() > flight.began + limit:
            doing = "writing" if flight.phase == "write" else "committing"
            flight.problem = f"still {doing} after {limit:.4g} s ({rule})"
        return 1, int(flight.problem is not None)

    def _advance(self, working: int, failed: int) -> bool:
        """The next thing that follows. False: the save was given up."""
        flight, began = self._flight, time.monotonic()
        if flight is None or (working and not failed):
            return True
        if failed:
            return self._abort(flight)
        if flight.phase == "write":
            self._commit(flight)
            flight.blocked_s += time.monotonic() - began
        else:
            self._end(flight)
        return True

    def _commit(self, flight: _Flight) -> None:
        """All ranks have written: rank 0 gathers what, and has it committed."""
        assert flight.task is not None
        self.on_point("finalize", flight.step)
        first = self._rank == 0
        parts: list[Any] | None = [None] * self._size if first else None
        torch.distributed.gather_object(flight.task.result, parts)
        flight.phase, flight.task = "commit", None
        if parts is None:
            return
        flight.written = parts
        manifest = Manifest(
            step=flight.step,
            attempt=self.provenance.attempt,
            config_digest=str(self.provenance.info.get("config_digest", "")),
            code_version=self.provenance.code_version,
            topology=groups.topology(),
            files={name: record for part in parts for name, record in part.files.items()},
        )
        verified = {*self.verified, flight.step}

        def work(tell: Tell) -> None:
            self.store.on_stage("write")
            self.on_point("commit", flight.step)
            record = write.write_index(
                flight.plan, parts, flight.folder, on_write=lambda *_: self.on_point("write", flight.step)
            )
            manifest.files[METADATA] = record
            self.store.on_stage("index")
            self.store.commit(manifest, number=flight.number)
            tell(_COMMITTED)
            self.store.prune(self.retention.keep, every=self.retention.keep_every, verified=verified)

        flight.task = self._start(work, name="the commit")

    def _end(self, flight: _Flight, *, problem: str = "") -> None:
        seconds = time.monotonic() - flight.began
        self._flight, self._in_a_row = None, 0
        self.verified.add(flight.step)
        fields: dict[str, Any] = {"problem": problem} if problem else {}
        if flight.borders > 1:
            self._step_time_saving = (seconds - flight.blocked_s) / flight.borders
            fields["step_time_s"] = round(self._step_time_saving, 4)
        records = [record for part in flight.written for record in part.files.values()]
        self._tell(
            "save_committed",
            step=flight.step,
            seconds=round(seconds, 3),
            blocked_s=round(flight.blocked_s, 4),
            bytes=sum(record.size for record in records),
            hash_s=round(max((part.hash_s for part in flight.written), default=0.0), 4),
            **fields,
        )

    def _abort(self, flight: _Flight) -> bool:
        """Some rank's part failed: nobody goes on with this save. True if it turns out to have been committed."""
        committed = False
        if flight.task is not None:
            if flight.problem is None and not flight.task.poll():
                flight.problem = flight.task.problem
            if not flight.task.kill():
                self._clearing.append(flight.task)
            committed = _COMMITTED in flight.task.messages
        found: list[Any] = [None] * self._size
        torch.distributed.all_gather_object(found, (flight.problem, committed))
        problems = {rank: problem for rank, (problem, _) in enumerate(found) if problem is not None}
        if any(committed for _, committed in found):  # only the clearing up behind it failed
            self._end(flight, problem=next(iter(problems.values()), ""))
            return True
        first_hand = {rank: why for rank, why in problems.items() if not why.startswith(grouped.ELSEWHERE)}
        rank, reason = next(iter((first_hand or problems).items()))
        self._flight = None
        self.failures += 1
        self._in_a_row += 1
        self._reason = f"rank {rank}: {reason}"
        self._tell(
            "save_failed",
            step=flight.step,
            rank=rank,
            reason=reason,
            ranks=sorted(problems),
            seconds=round(time.monotonic() - flight.began, 3),
            in_a_row=self._in_a_row,
        )
        if self._rank == 0:
            self._remove(flight.folder)
        return False

    def _remove(self, folder: Path) -> None:
        """Best effort, and not by this process: where writing hangs, removing may hang too."""

        def work(tell: Tell) -> None:
            shutil.rmtree(folder, ignore_errors=True)

        if self.settings.asynchronous:
            self._clearing.append(Forked(work, name="the removal"))
        else:
            work(lambda _: None)

    def _give_up(self) -> None:
        if self._in_a_row >= self.settings.max_failures:
            raise SaveError(
                f"{self._in_a_row} saves in a row failed, the last one on {self._reason}",
                remedy=self._remedy("start it again: it goes on from the newest checkpoint"),
            )

    def _remedy(self, then: str) -> str:
        return f"make sure that {self.store.root} can be written (space, quota, mount), then {then}"

    def _tell(self, event: str, **fields: Any) -> None:
        if self._rank == 0:
            self.on_event(event, **fields)
