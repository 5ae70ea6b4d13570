"""Reads the prepared data once in the background after a start, and ends the run if a file was altered.

A flipped bit in a `.bin` file is another token, which nothing else would notice. The first rank of each node reads in a
thread of the lowest priority (`data.verify`); ranks exchange their results at logged steps until all data was read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from mmscale.config import Config
from mmscale.data import digests
from mmscale.data.prepared import neighbours, selection
from mmscale.errors import DamagedDataError, DataError
from mmscale.runtime import device
from mmscale.runtime.groups import gathered
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step_report import StepReport, is_logged

_NAMED = 10  # files in an event, at most
_LOWEST = 19  # priority of the thread: training takes precedence if there are few cores


@dataclass(frozen=True)
class CheckProgress:
    """What one rank has found so far.

    Attributes:
        done: it has read all of its part.
        files, bytes: number of intact files, and their size.
        seconds: since it began.
        damaged: files that differ from their digest, each with the difference.
        unread: why the storage failed to read a file; "": it did not fail.
    """

    done: bool = False
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    damaged: tuple[str, ...] = ()
    unread: str = ""


class Reader:
    """The thread that reads.

    Attributes:
        found: replaced as a whole, so that another thread can read it at any time.

    Args:
        folders: of prepared data sets; those without digests are left out.
        part, parts: which of the files are read: every `parts`-th one, starting at `part`. `parts` 0: none.
    """

    def __init__(self, folders: Sequence[Path], *, part: int, parts: int) -> None:
        self.found = CheckProgress(done=parts == 0)
        self._folders, self._part, self._parts = folders, part, parts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data check", daemon=True)

    def start(self) -> None:
        """Start reading."""
        if self._parts:
            self._thread.start()

    def close(self) -> None:
        """Stop after the present chunk. Does not wait for a storage that does not answer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # on Linux each thread has its own priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        began, files, size, damaged, unread = time.monotonic(), 0, 0, [], ""
        seen: digests.Seen = {}
        try:
            for folder, name, digest in self._files():
                found = digests.verify(folder, {name: digest}, stopped=self._stop.is_set, seen=seen)
                problems = [problem for _, problem in found]
                if self._stop.is_set():
                    return
                damaged += [f"{folder / name} {problem}, as read on {socket.gethostname()}" for problem in problems]
                if not problems:
                    files, size = files + 1, size + (folder / name).stat().st_size
                self.found = CheckProgress(False, files, size, time.monotonic() - began, tuple(damaged))
        except DataError as error:  # digests.json itself is damaged
            damaged.append(error.cause.removeprefix("data: "))
        except OSError as error:
            unread = f"{error.filename or 'the data'}: {error.strerror or error} (on {socket.gethostname()})"
        self.found = CheckProgress(True, files, size, time.monotonic() - began, tuple(damaged), unread)

    def _files(self) -> Sequence[tuple[Path, str, str]]:
        read = ((folder, digests.read(folder)) for folder in self._folders)
        known = [(folder, {} if found is None else found | _later_digests(folder)) for folder, found in read]
        files = [(folder, name, digest) for folder, found in known for name, digest in sorted(found.items())]
        return files[self._part :: self._parts]


def _later_digests(folder: Path) -> dict[str, str]:
    """Digests of files that commands have added to a prepared data set."""
    return selection.digests_of(folder) | neighbours.digests_of(folder)


class DataCheck:
    """A hook that reports once that the data is intact, or ends the run.

    Every rank makes one and enters it; making it is a collective.

    Args:
        config: the data, `data.verify`, and which steps are logged.
        env: place of this rank; the first rank of each node reads.
        on_event: writes an event.
        warn: prints a line.
    """

    def __init__(
        self, config: Config, env: RankEnv, *, on_event: Callable[..., None], warn: Callable[[str], None]
    ) -> None:
        self._config, self._on_event, self._warn = config, on_event, warn
        self._open = config.data.verify != "off"
        readers = [rank for rank, reads in enumerate(gathered(env.local_rank == 0)) if reads] if self._open else []
        folders = [source.path for source in config.data.sources] + [*config.data.validation.values()]
        spread = config.data.verify == "once"
        reads = self._open and env.rank in readers
        self._reader = Reader(
            [Path(folder) for folder in dict.fromkeys(folders)],
            part=readers.index(env.rank) if reads and spread else 0,
            parts=(len(readers) if spread else 1) if reads else 0,
        )

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Exchange results at a logged step.

        Raises:
            DamagedDataError: a file was altered since it was prepared; the same on every rank.
        """
        if not self._open or not is_logged(self._config, report.step):
            return
        mine = self._reader.found
        # Ranks exchange two flags only; details are gathered once, when all are done or one has found damage.
        news = torch.tensor([not mine.done, bool(mine.damaged)], dtype=torch.int32, device=device.taken())
        torch.distributed.all_reduce(news, op=torch.distributed.ReduceOp.MAX)
        reading, broken = news.tolist()
        if reading and not broken:
            return
        everywhere: list[CheckProgress] = gathered(mine)
        damaged = [line for found in everywhere for line in found.damaged]
        if damaged:
            self._on_event("data_damaged", step=report.step, problems=damaged[:_NAMED])
            more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise DamagedDataError(
                f"data: {damaged[0]}{more}",
                remedy="copy or prepare the data again (`mmscale data verify` checks it), then start it again; "
                "checkpoints of this attempt may be trained on the damaged file",
            )
        self._open = False
        self._report(report.step, everywhere)

    def _report(self, step: int, everywhere: Sequence[CheckProgress]) -> None:
        files = sum(found.files for found in everywhere)
        unread = [found.unread for found in everywhere if found.unread]
        for reason in unread:
            self._on_event("data_unread", step=step, reason=reason)
            self._warn(f"the data could not be checked: {reason}")
        if files and not unread:
            size, seconds = sum(found.bytes for found in everywhere), max(found.seconds for found in everywhere)
            self._on_event("data_verified", step=step, files=files, bytes=size, seconds=round(seconds, 3))
