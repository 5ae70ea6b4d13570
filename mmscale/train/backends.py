# Where logged figures go besides metrics.jsonl: TensorBoard, Weights & Biases, Prometheus. All optional.
# A run never ends or waits because of one: a package or service that is away is said once and left out from then on; a
# disk that refuses is tried again.
"""Logging back ends."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmscale.runtime.disk_writer import DiskWriter
from mmscale.train.held_out import HeldOut

_log = logging.getLogger(__name__)
_FIGURE = 200  # bytes of memory, about
_WANDB_WAIT_S = 30.0  # for the service's answer at the start; W&B's own default is 90 s of idle devices


class Backend(Protocol):
    """Takes the figures of logged steps. Any exception of any method means that it is gone.

    But for an OSError where `on_disk` is set: then the same call is made again, after the disk may have recovered.
    """

    on_disk: bool

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """The figures of a step; values may be NaN or infinite."""

    def rolled_back(self) -> None:
        """Steps that are written already come again."""

    def close(self) -> None:
        """Write what is left."""


class Backends:
    """Those back ends that work, each with a thread of its own: one that hangs delays nothing else.

    Args:
        makers: by name, what starts each one.
        tell: is told the name and the reason of each one that is given up.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Backend]], *, tell: Callable[[str, str], None] | None = None
    ) -> None:
        self._tell = tell
        self._writers: dict[str, DiskWriter] = {}
        self.working: dict[str, Backend] = {}
        for name, make in makers.items():
            self._guarded(name, lambda name=name, make=make: self.working.__setitem__(name, make()))  # type: ignore[misc]
        for name in self.working:
            self._writers[name] = DiskWriter(f"log.{name}", say=None)

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Hand the figures of a step to all."""
        self._each(lambda backend: backend.write(step, values, attempt=attempt), size=_FIGURE * len(values))

    def rolled_back(self) -> None:
        """Tell all that steps come again."""
        self._each(lambda backend: backend.rolled_back())

    def close(self) -> None:
        """Close all."""
        self._each(lambda backend: backend.close())
        for writer in self._writers.values():
            writer.close()
        self.working.clear()

    def _each(self, call: Callable[[Backend], None], *, size: int = 0) -> None:
        for name in list(self.working):
            self._writers[name].submit(functools.partial(self._call, name, call), size=size)

    def _call(self, name: str, call: Callable[[Backend], None]) -> None:
        backend = self.working.get(name)
        if backend is not None:
            self._guarded(name, lambda: call(backend), again=backend.on_disk)

    def _guarded(self, name: str, call: Callable[[], None], *, again: bool = False) -> None:
        # Whatever a service's client raises, also SystemExit, which W&B's once raised: training goes on.
        try:
            call()
        except (Exception, SystemExit) as error:
            if again and isinstance(error, OSError):
                raise
            self.working.pop(name, None)
            lines = str(error).strip().splitlines()
            reason = lines[0][:300] if lines else type(error).__name__
            _log.warning("log.%s is off from here on: %s; the run goes on, metrics.jsonl has everything", name, reason)
            if self._tell is not None:
                self._tell(name, reason)


def backends_of(
    run_dir: Path,
    *,
    files: Path | None = None,
    name: str = "",
    tensorboard: bool = False,
    wandb: str | None = None,
    prometheus: tuple[str, int] | None = None,
    tell: Callable[[str, str], None] | None = None,
) -> Backends:
    """The back ends that are asked for and can be started.

    Args:
        run_dir: the folder of the run, or of a stage of it.
        files: the same folder by a path that this process alone can follow; default: `run_dir`.
        name: of the run; default: the folder's.
        tensorboard: write TensorBoard events into `<run_dir>/tensorboard`.
        wandb: W&B project; None: off.
        prometheus: address and port to serve figures at; None: off.
        tell: is told the name and the reason of each one that is given up.
    """
    makers: dict[str, Callable[[], Backend]] = {}
    name = name or run_dir.name
    if tensorboard:
        makers["tensorboard"] = lambda: TensorBoard((files or run_dir) / "tensorboard")
    if wandb is not None:
        makers["wandb"] = lambda: WeightsAndBiases(run_dir, project=wandb, name=name)
    if prometheus is not None:
        makers["prometheus_port"] = lambda: Prometheus(name, address=prometheus[0], port=prometheus[1])
    return Backends(makers, tell=tell)


class TensorBoard:
    """TensorBoard's event files.

    Args:
        folder: of the event files.
    """

    on_disk = True

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"tensorboard is not installed (pip install tensorboard): {error}") from error
        self._type: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None  # made at the first write, which knows the step to start from

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """One scalar for each figure."""
        try:
            if self._writer is None:
                # purge_step: what an earlier attempt wrote for this step and later ones was rolled back.
                self._writer = self._type(str(self._folder), purge_step=step)
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except OSError:
            # Its thread has ended with the error: the next try begins another file, which purges what this one has.
            broken, self._writer = self._writer, None
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            raise

    def rolled_back(self) -> None:
        """The next write purges what it repeats."""
        self.close()

    def close(self) -> None:
        """Close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in `<run_dir>/wandb`.

    Args:
        run_dir: the run's folder.
        project: name of the project.
        name: of the run.
    """

    on_disk = False

    def __init__(self, run_dir: Path, *, project: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"wandb is not installed (pip install 'mmscale[wandb]'): {error}") from error
        # The same id for every attempt of a run; two runs of one name in different folders must not share it.
        place = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=f"{name}-{place}",
            dir=str(run_dir),
            resume="allow",
            settings=wandb.Settings(init_timeout=_WANDB_WAIT_S),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own step only grows: it would drop a re-done step

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Queue the figures; sending happens in W&B's own process."""
        self._run.log({"step": step, "attempt": attempt, **values})

    def rolled_back(self) -> None:
        """Steps that come again replace nothing: both are in the history, told apart by their order."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class Prometheus:
    """Serves the latest figures over HTTP, as gauges `mmscale_<name>` with the labels run, modality and split.

    `experts/text/unrouted_fraction` is `mmscale_experts_unrouted_fraction{modality="text"}`, `eval/loss/text` is
    `mmscale_loss{modality="text",split="eval"}`.

    Args:
        run: name of the run.
        address: of the interface to serve at.
        port: to serve at; 0: any free one.
    """

    on_disk = False

    def __init__(self, run: str, *, address: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ImportError(
                f"prometheus-client is not installed (pip install 'mmscale[prometheus]'): {error}"
            ) from error
        self.registry = CollectorRegistry(auto_describe=False)
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(port, addr=address, registry=self.registry)
        self.port: int = self._server.server_port

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Replace the figures that are served."""
        for key, value in {"step": step, "attempt": attempt, **values}.items():
            name, modality, split = prometheus_name(key)
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name)
            self._gauges[name].labels(run=self._run, modality=modality, split=split).set(value)

    def rolled_back(self) -> None:
        """Gauges know only the latest."""

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        return Gauge(name, f"{name} of the latest logged step", ("run", "modality", "split"), registry=self.registry)


_MODALITY_LAST = ("loss", "tokens", "depth/selected_fraction")


def prometheus_name(key: str) -> tuple[str, str, str]:
    """Name, modality and split of a key of metrics.jsonl; the latter two may be empty."""
    measured = HeldOut.of(key)
    split = "" if measured is None else key.removesuffix(f"/{measured.figure}")
    parts = (key if measured is None else measured.figure).split("/")
    modality = ""
    if len(parts) > 1 and "/".join(parts[:-1]) in _MODALITY_LAST:
        modality = parts.pop()
    elif len(parts) == 3 and parts[0] == "experts":
        modality = parts.pop(1)
    return "mmscale_" + re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(parts)), modality, split
