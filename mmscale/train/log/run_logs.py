"""Rank 0's records of an attempt: metrics.jsonl, events.jsonl, configuration, environment and printed lines.

The configuration is written when training starts. An attempt that is refused, or that finds the run finished, does not
overwrite the one of the previous attempt.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.config import Config, LogConfig
from mmscale.config.load import dump
from mmscale.errors import MmscaleError, SaveError
from mmscale.resilience.lease import Fence, FencedError
from mmscale.runs.attempts import LATEST_SETTINGS, settings_name
from mmscale.runs.events import EventLog
from mmscale.runtime.disk_writer import Appended, DiskWriter, replacing
from mmscale.runtime.environment import ENVIRONMENT, environment_of_run, environment_text
from mmscale.runtime.open_folder import OpenFolder
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.log.sink_run import SinkRun, shown_settings
from mmscale.train.log.sinks import Backends, backends_of


class Transcript:
    """Lines that rank 0 prints, also written to `logs/attempt_N/rank_0.log` for `mmscale logs`.

    Nothing is written until training starts, so an attempt with nothing to do leaves no log.

    Args:
        file: the log; None: no log. A launch redirects the output of its ranks into logs anyway.
    """

    def __init__(self, file: Appended | None) -> None:
        self._file = file
        self._waiting: list[str] | None = []

    def begin(self) -> None:
        """Write the lines so far, and each later line immediately."""
        waiting, self._waiting = self._waiting or [], None
        for text in waiting:
            self.say(text)

    def say(self, text: str) -> None:
        """Add a line."""
        if self._file is None:
            return
        if self._waiting is not None:
            self._waiting.append(text)
        else:
            self._file.append(f"{text}\n".encode(errors="replace"))

    def say_error(self, error: BaseException) -> None:
        """Add the error that ended the attempt: cause and remedy, or the traceback of a crash."""
        if isinstance(error, MmscaleError):
            self.say(f"error: {error.cause}" + (f"\n  fix: {error.remedy}" if error.remedy else ""))
        else:
            self.say("".join(traceback.format_exception(error)).rstrip())


@dataclass(frozen=True)
class RunLogs:
    """The open logs of an attempt.

    Attributes:
        metrics, events: None on ranks other than 0.
        backends: starts the sinks.
        writer: writes all files; None on ranks other than 0, as are the following.
        folder: where the files are.
        transcript: the lines that rank 0 prints.
    """

    metrics: MetricsLog | None = None
    events: EventLog | None = None
    backends: Callable[[Config], Backends | None] = lambda config: None
    writer: DiskWriter | None = None
    folder: OpenFolder | None = None
    transcript: Transcript = field(default_factory=lambda: Transcript(None))

    def begin(self, config: Config, run: Path, *, attempt: int) -> None:
        """Training starts: write the attempt's configuration and environment, and start the sinks.

        Does nothing on other ranks than 0.
        """
        if self.metrics is None:
            return
        self._write_settings(config, run, attempt=attempt)
        self.transcript.begin()
        if (backends := self.backends(config)) is not None:
            self.metrics.attach(backends)

    def _write_settings(self, config: Config, run: Path, *, attempt: int) -> None:
        """Write the configuration and the environment of an attempt into the run's folder, each atomically."""
        text = dump(config).encode()
        for name in (settings_name(attempt), LATEST_SETTINGS):
            self.write_file(run / name, text)
        self.write_file(run / ENVIRONMENT, environment_text(environment_of_run()))

    def write_file(self, file: Path, content: bytes) -> None:
        """Write a file of the run atomically; on other ranks nothing happens."""
        if self.writer is not None:
            self.writer.submit(replacing(file, content), size=len(content), key=str(file))

    def add_event(self, event: str, **fields: Any) -> None:
        """Write an event; on other ranks nothing happens."""
        if self.events is not None:
            self.events.add(event, **fields)


@contextlib.contextmanager
def open_run_logs(
    folder: Path,
    *,
    attempt: int,
    rank: int,
    fence: Fence,
    log: LogConfig | None = None,
    name: str = "",
    transcribed: bool = False,
) -> Iterator[RunLogs]:
    """Open the logs of a folder and close them at the end; an error that passes through is written as an event.

    Args:
        folder: of the run, or of a stage of it.
        attempt: number of the attempt.
        rank: of this process.
        fence: checked before every line: an attempt that has lost the run writes none.
        log: the sinks to start in `RunLogs.begin`; None: none.
        name: name of the run in the sinks; default: its folder's.
        transcribed: whether printed lines are also written to a log.

    Raises:
        FencedError: another attempt has taken over the run.
        SaveError: the folder cannot be made. Later write errors do not end the run.
    """
    if rank != 0:
        yield RunLogs()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder} cannot be made: {error.strerror}", remedy="choose another run.dir") from None
    fence.check()
    writer = DiskWriter(str(folder))
    with OpenFolder(folder) as held:
        events = EventLog(held.stable, attempt, may_write=fence.check, writer=writer)
        writer.on_change = events.add
        metrics = MetricsLog(held.stable, attempt=attempt, may_write=fence.check, writer=writer)
        printed = held.stable / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log"
        transcript = Transcript(Appended(printed, writer) if transcribed else None)
        backends = functools.partial(_backends, held, name or folder.name, log, events)
        try:
            yield RunLogs(metrics, events, backends, writer, held, transcript)
        except FencedError:
            raise  # without writing an event
        except BaseException as error:
            transcript.say_error(error)
            events.add("fault", error=type(error).__name__, message=str(error)[:500])
            raise
        finally:
            metrics.close()
            events.close()
            writer.close()


def _backends(held: OpenFolder, name: str, log: LogConfig | None, events: EventLog, config: Config) -> Backends | None:
    if log is None:
        return None
    return backends_of(
        SinkRun(held.path, held.stable, name, shown_settings(config)),
        log,
        on_disabled=lambda name, reason: events.add("log_off", log=name, reason=reason),
    )
