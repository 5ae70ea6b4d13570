"""Optional sinks of metrics besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Prometheus.

They never end a run or block it. If a package or service is missing, that is reported once and the sink is turned off;
writes to a failing disk are retried.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmscale.config import LogConfig
from mmscale.runs.held_out import HeldOut
from mmscale.runtime.disk_writer import DiskWriter
from mmscale.tables import plugins
from mmscale.tables.plugins import Use
from mmscale.train.log.mlflow_sink import MLflow
from mmscale.train.log.sink_run import SinkRun

_log = logging.getLogger(__name__)
_FIGURE = 200  # approximate memory of a queued value [bytes]
_COMPARED = ("loss", "eval/loss")  # metrics shown next to the settings in TensorBoard's table of runs
_WANDB_WAIT_S = 30.0  # timeout for the service's first answer; with W&B's own default devices would be idle for 90 s


class Backend(Protocol):
    """Receives the metrics of logged steps. Any exception of any method turns it off.

    Exception: after an OSError of a sink with `on_disk` the call is repeated, because the disk may recover.
    """

    on_disk: bool

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Write the metrics of a step; values may be NaN or infinite."""

    def rolled_back(self) -> None:
        """The run was rolled back: steps that are already written will be repeated."""

    def close(self) -> None:
        """Write the remaining values."""


class Backends:
    """The active sinks, each with its own thread, so that one that hangs does not delay the others.

    Args:
        makers: functions that start the sinks, by name.
        on_disabled: called with the name of a sink that is turned off, and the reason.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Backend]], *, on_disabled: Callable[[str, str], None] | None = None
    ) -> None:
        self._on_disabled = on_disabled
        self._writers: dict[str, DiskWriter] = {}
        self.working: dict[str, Backend] = {}
        for name, make in makers.items():
            self._guarded(name, lambda name=name, make=make: self.working.__setitem__(name, make()))  # type: ignore[misc]
        for name in self.working:
            self._writers[name] = DiskWriter(f"log.{name}", say=None)

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Pass the metrics of a step to all sinks."""
        self._each(lambda backend: backend.write(step, values, attempt=attempt), size=_FIGURE * len(values))

    def rolled_back(self) -> None:
        """Pass a roll-back on to all sinks."""
        self._each(lambda backend: backend.rolled_back())

    def close(self) -> None:
        """Close all sinks."""
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
            self._guarded(name, lambda: call(backend), again=getattr(backend, "on_disk", False))

    def _guarded(self, name: str, call: Callable[[], None], *, again: bool = False) -> None:
        # Training continues after any exception of a service's client, including SystemExit, which W&B has raised.
        try:
            call()
        except (Exception, SystemExit) as error:
            if again and isinstance(error, OSError):
                raise
            self.working.pop(name, None)
            lines = str(error).strip().splitlines()
            reason = lines[0][:300] if lines else type(error).__name__
            _log.warning(
                "log.%s is off from here on: %s; the run continues; metrics.jsonl has everything", name, reason
            )
            if self._on_disabled is not None:
                self._on_disabled(name, reason)


def backends_of(run: SinkRun, log: LogConfig, *, on_disabled: Callable[[str, str], None] | None = None) -> Backends:
    """The requested sinks that can be started: built-in ones by their setting, plug-ins by `log.sinks`.

    Args:
        run: its metrics are written.
        log: which sinks are requested.
        on_disabled: called with the name of a sink that is turned off, and the reason.
    """
    makers: dict[str, Callable[[], Backend]] = {}
    for name, sink in SINKS.items():
        if getattr(log, name) not in (None, False):
            makers[name] = functools.partial(sink, run, log)
    for name, arguments in log.sinks.items():
        makers[name] = functools.partial(plugins.make, Use("sink", "log.sinks", name, arguments), run)
    return Backends(makers, on_disabled=on_disabled)


class TensorBoard:
    """TensorBoard's event files.

    Args:
        folder: of the event files.
        settings: shown as hyperparameters.
    """

    on_disk = True

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"tensorboard is not installed (pip install tensorboard): {error}") from error
        self._type: Any = SummaryWriter
        self._folder = folder
        self._settings = dict(settings or {})
        self._writer: Any = None  # made at the first write, whose step is the first one of the file

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Write one scalar for each metric."""
        try:
            if self._writer is None:
                # purge_step: values that an earlier attempt wrote for this step and later ones are outdated.
                self._writer = self._type(str(self._folder), purge_step=step)
                self._write_settings()
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except OSError:
            # The writer's thread has ended with the error. The next call begins another file, which purges this one's
            # values.
            broken, self._writer = self._writer, None
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            raise

    def _write_settings(self) -> None:
        """Write the settings for the tab HParams; `SummaryWriter.add_hparams` would create a separate run for them."""
        if self._settings:
            from torch.utils.tensorboard.summary import hparams

            # torch would treat a bool as a number.
            shown = {key: str(value) if isinstance(value, bool) else value for key, value in self._settings.items()}
            for summary in hparams(shown, dict.fromkeys(_COMPARED, 0.0)):
                self._writer.file_writer.add_summary(summary)

    def rolled_back(self) -> None:
        """The next write purges the values that it repeats."""
        self.close()

    def close(self) -> None:
        """Close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in `<run_dir>/wandb`.

    Args:
        run: its metrics and configuration are sent.
        project: name of the project.
    """

    on_disk = False

    def __init__(self, run: SinkRun, *, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"wandb is not installed (pip install 'mmscale[wandb]'): {error}") from error
        self._run: Any = wandb.init(
            project=project,
            name=run.name,
            id=run.id,
            dir=str(run.folder),
            resume="allow",
            config=dict(run.settings),
            allow_val_change=True,  # a setting may differ from the previous attempt's
            settings=wandb.Settings(init_timeout=_WANDB_WAIT_S),
        )
        # W&B's own step can only increase, so it would drop a repeated step.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """Queue the values; W&B's own process sends them."""
        self._run.log({"step": step, "attempt": attempt, **values})

    def rolled_back(self) -> None:
        """Nothing: repeated steps replace no values. Both are in the history and differ in their order."""

    def close(self) -> None:
        """Wait until everything was sent."""
        self._run.finish()


class Prometheus:
    """Serves the latest metrics over HTTP, as gauges `mmscale_<name>` with the labels run, modality and split.

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
        """Replace the served values."""
        for key, value in {"step": step, "attempt": attempt, **values}.items():
            name, modality, split = prometheus_name(key)
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name)
            self._gauges[name].labels(run=self._run, modality=modality, split=split).set(value)

    def rolled_back(self) -> None:
        """Nothing: gauges have only the latest value."""

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        return Gauge(name, f"{name} of the latest logged step", ("run", "modality", "split"), registry=self.registry)


# The built-in sinks by the setting of `log` that turns each on.
SINKS: dict[str, Callable[[SinkRun, LogConfig], Backend]] = {
    "tensorboard": lambda run, log: TensorBoard(run.files / "tensorboard", run.settings),
    "wandb": lambda run, log: WeightsAndBiases(run, project=log.wandb or ""),
    "mlflow": lambda run, log: MLflow(run, experiment=log.mlflow or ""),
    "prometheus_port": lambda run, log: Prometheus(
        run.name, address=log.prometheus_address, port=log.prometheus_port or 0
    ),
}
_MODALITY_LAST = ("loss", "conditional_loss", "bits_per_byte", "tokens", "depth/selected_fraction")


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
