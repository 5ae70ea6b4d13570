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
from mmscale.resilience.lease import Fence, FencedError
from mmscale.train.backends import Backends, backends_of
from mmscale.train.metrics import EventLog, MetricsLog, write_environment


@dataclass(frozen=True)
class Records:
    """The open logs of an attempt.

    Attributes:
        metrics, events: None on ranks other than 0.
        backends: starts what else gets the figures.
    """

    metrics: MetricsLog | None = None
    events: EventLog | None = None
    backends: Callable[[], Backends | None] = lambda: None

    def begin(self, config: Config, run: Path, *, attempt: int) -> None:
        """Training begins: write the attempt's configuration and environment, and start the back ends.

        On other ranks nothing happens.
        """
        if self.metrics is None:
            return
        write_settings(config, run, attempt=attempt)
        if (backends := self.backends()) is not None:
            self.metrics.attach(backends)

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
    """
    if rank != 0:
        yield Records()
        return
    folder.mkdir(parents=True, exist_ok=True)
    fence.check()
    events = EventLog(folder, attempt, may_write=fence.check)
    metrics = MetricsLog(folder, attempt=attempt, may_write=fence.check)
    try:
        yield Records(metrics, events, lambda: _backends(folder, name or folder.name, log, events))
    except FencedError:
        raise  # not a line more
    except BaseException as error:
        events.add("fault", error=type(error).__name__, message=str(error)[:500])
        raise
    finally:
        metrics.close()
        events.close()


def _backends(folder: Path, name: str, log: LogConfig | None, events: EventLog) -> Backends | None:
    if log is None:
        return None
    port = log.prometheus_port
    return backends_of(
        folder,
        name=name,
        tensorboard=log.tensorboard,
        wandb=log.wandb,
        prometheus=None if port is None else (log.prometheus_address, port),
        tell=lambda name, reason: events.add("log_off", log=name, reason=reason),
    )


def write_settings(config: Config, run: Path, *, attempt: int) -> None:
    """The configuration and the environment of an attempt into the run's folder, each whole or not at all."""
    text = dump(config)
    for name in (f"config.{attempt}.yaml", "config.yaml"):
        temporary = run / f"{name}.tmp"
        temporary.write_text(text)
        temporary.replace(run / name)
    write_environment(run)
