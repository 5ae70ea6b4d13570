"""What rank 0 writes about an attempt: metrics.jsonl, events.jsonl, its configuration and environment.

The configuration is written when training begins: an attempt that finds the run finished, or is refused, leaves that of
the attempt before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config import Config, LogConfig
from mmscale.config.load import dump
from mmscale.errors import SaveError
from mmscale.resilience.lease import Fence, FencedError
from mmscale.runtime.disk_writer import DiskWriter, replacing
from mmscale.runtime.environment import ENVIRONMENT, environment_of_run, environment_text
from mmscale.runtime.held_folder import HeldFolder
from mmscale.train.backends import Backends, backends_of
from mmscale.train.metrics import EventLog, MetricsLog


@dataclass(frozen=True)
class Records:
    """The open logs of an attempt.

    Attributes:
        metrics, events: None on ranks other than 0.
        backends: starts what else gets the figures.
        writer: of all files; None on ranks other than 0, here and below.
        folder: where they are.
    """

    metrics: MetricsLog | None = None
    events: EventLog | None = None
    backends: Callable[[], Backends | None] = lambda: None
    writer: DiskWriter | None = None
    folder: HeldFolder | None = None

    def begin(self, config: Config, run: Path, *, attempt: int) -> None:
        """Training begins: write the attempt's configuration and environment, and start the back ends.

        On other ranks nothing happens.
        """
        if self.metrics is None:
            return
        self._write_settings(config, run, attempt=attempt)
        if (backends := self.backends()) is not None:
            self.metrics.attach(backends)

    def _write_settings(self, config: Config, run: Path, *, attempt: int) -> None:
        """The configuration and the environment of an attempt into the run's folder, each whole or not at all."""
        text = dump(config).encode()
        for name in (f"config.{attempt}.yaml", "config.yaml"):
            self.write_file(run / name, text)
        self.write_file(run / ENVIRONMENT, environment_text(environment_of_run()))

    def write_file(self, file: Path, content: bytes) -> None:
        """Give a file of the run its content, whole or not at all; on other ranks nothing happens."""
        if self.writer is not None:
            self.writer.submit(replacing(file, content), size=len(content), key=str(file))

    def tell(self, event: str, **fields: Any) -> None:
        """Add an event; on other ranks nothing happens."""
        if self.events is not None:
            self.events.add(event, **fields)


@contextlib.contextmanager
def open_records(
    folder: Path, *, attempt: int, rank: int, fence: Fence, log: LogConfig | None = None, name: str = ""
) -> Iterator[Records]:
    """The logs of a folder, closed in the end; an error that passes becomes an event.

    Args:
        folder: of the run, or of a stage of it.
        attempt: number of the attempt.
        rank: of this process.
        fence: asked before every line: an attempt that has lost the run writes none.
        log: what gets the figures besides, from `Records.begin` on; None: nothing.
        name: what these call the run; default: its folder's.

    Raises:
        FencedError: another attempt has taken the run over.
        SaveError: the folder cannot be made. Once it is there a disk that refuses ends nothing.
    """
    if rank != 0:
        yield Records()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder} cannot be made: {error.strerror}", remedy="choose another run.dir") from None
    fence.check()
    writer = DiskWriter(str(folder))
    with HeldFolder(folder) as held:
        events = EventLog(held.stable, attempt, may_write=fence.check, writer=writer)
        writer.on_change = events.add
        metrics = MetricsLog(held.stable, attempt=attempt, may_write=fence.check, writer=writer)
        try:
            yield Records(metrics, events, lambda: _backends(held, name or folder.name, log, events), writer, held)
        except FencedError:
            raise  # not a line more
        except BaseException as error:
            events.add("fault", error=type(error).__name__, message=str(error)[:500])
            raise
        finally:
            metrics.close()
            events.close()
            writer.close()


def _backends(held: HeldFolder, name: str, log: LogConfig | None, events: EventLog) -> Backends | None:
    if log is None:
        return None
    port = log.prometheus_port
    return backends_of(
        held.path,
        files=held.stable,
        name=name,
        tensorboard=log.tensorboard,
        wandb=log.wandb,
        prometheus=None if port is None else (log.prometheus_address, port),
        tell=lambda name, reason: events.add("log_off", log=name, reason=reason),
    )
