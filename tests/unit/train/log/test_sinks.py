# Back ends get what is logged, as their own readers see it; one that is away or breaks is said once and left out.
"""Tests of mmscale.train.log.sinks."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config, LogConfig
from mmscale.runs.metrics import read_metrics
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.log.sink_run import SinkRun, shown_settings
from mmscale.train.log.sinks import SINKS, Backend, Backends, Prometheus, backends_of, prometheus_name

MODEL: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 64}]},
    "model": {"kind": "dense", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2},
}


def sinks(
    folder: Path,
    *,
    on_disabled: Callable[[str, str], None] | None = None,
    settings: dict[str, object] | None = None,
    **log: object,
) -> Backends:
    run = SinkRun(folder, folder, folder.name, settings or {})
    return backends_of(run, LogConfig(**log), on_disabled=on_disabled)  # type: ignore[arg-type]


def test_settings_that_sinks_show() -> None:
    """Every setting of one value, without arguments of plug-ins: a key of a service may be among them."""
    secret = {"log": {"sinks": {"a.b:Sink": {"key": "SECRET"}}}, "train": {"hooks": {"a.b:Hook": {"key": "SECRET"}}}}
    shown = shown_settings(Config.model_validate(MODEL | secret))
    assert shown["model.num_layers"] == 2 and shown["optim.lr"] == 1e-4 and shown["model.tie_embeddings"] is False
    assert "log.wandb" not in shown  # null
    assert shown["log.sinks.0"] == "a.b:Sink" and "SECRET" not in str(shown)
    assert all(isinstance(value, bool | int | float | str) for value in shown.values())


def test_tensorboard_shows_settings_as_hyperparameters(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {"optim.lr": 1e-3, "model.kind": "moma", "train.dry_run": True, "train.steps": 5}
    for attempt in (1, 2):
        log = MetricsLog(tmp_path, attempt=attempt)
        log.attach(sinks(tmp_path, tensorboard=True, settings=settings))
        log.write(10 * attempt, {"loss": 1.0})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(found) == set(settings) and found["optim.lr"].number_value == 1e-3
    assert (found["model.kind"].string_value, found["train.dry_run"].string_value) == ("moma", "True")


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real store in files: settings as parameters, metrics by step, and one run for both attempts."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra: pip install 'mmscale[mlflow]'")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # restored in the end, also where the sink sets it
        monkeypatch.delenv(name)
    settings: dict[str, object] = {f"section.key_{number}": number for number in range(130)}
    for attempt, lr in ((1, 1e-3), (2, 5e-4)):
        backends = sinks(tmp_path, mlflow="moma", settings=settings | {"optim.lr": lr})
        log = MetricsLog(tmp_path, attempt=attempt)
        log.attach(backends)
        log.write(10 * attempt, {"loss": 1.0 / attempt, "eval/loss/text": math.nan})
        log.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("moma").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert len(run.data.params) == 131 and run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["changed/optim.lr"] == "0.0005" and run.data.tags["mmscale.attempt"] == "2"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 1.0), (20, 0.5)]


def test_every_built_in_sink_has_a_setting() -> None:
    assert set(SINKS) <= set(LogConfig.model_fields)


def test_tensorboard_drops_what_was_rolled_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = MetricsLog(tmp_path, attempt=1)
    first.attach(sinks(tmp_path, tensorboard=True))
    for step in (10, 20, 30):
        first.write(step, {"loss": 1.0, "time": 1.8e9})
    first.close()
    second = MetricsLog(tmp_path, attempt=2)
    second.attach(sinks(tmp_path, tensorboard=True))
    second.write(20, {"loss": 0.5})
    second.write(30, {"loss": 9.0})
    second.rolled_back(1)
    second.write(30, {"loss": 0.25})
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 1.0), (20, 0.5), (30, 0.25)]
    assert events.Tags()["scalars"] == ["loss"]


@contextlib.contextmanager
def served() -> Iterator[Prometheus]:
    pytest.importorskip("prometheus_client")
    backend = Prometheus("tiny", address="127.0.0.1", port=0)
    try:
        yield backend
    finally:
        backend.close()


def scrape(port: int) -> dict[str, float]:
    """What Prometheus's own parser makes of the answer: sample with its labels -> value."""
    parser = pytest.importorskip("prometheus_client.parser")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as answer:
        text = answer.read().decode()
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    return {
        f"{s.name} {','.join(f'{k}={v}' for k, v in sorted(s.labels.items()) if v and k != 'run')}": s.value
        for s in samples
    }


def test_prometheus_scrapes_the_latest_step(tmp_path: Path) -> None:
    with served() as backend:
        log = MetricsLog(tmp_path, attempt=3)
        log.attach(Backends({"prometheus_port": lambda: backend}))
        log.write(10, {"loss": 2.0, "loss/text": 1.5, "grad_norm": 1.0})
        log.write(20, {"loss": 1.0, "loss/text": 0.5, "grad_norm": math.nan, "experts/text/unrouted_fraction": 0.25})
        log.write(20, {"eval/causal/loss/text": 0.75})
        found = scrape(backend.port)
        assert math.isnan(found.pop("mmscale_grad_norm "))
        assert found == {
            "mmscale_step ": 20,
            "mmscale_attempt ": 3,
            "mmscale_loss ": 1.0,
            "mmscale_loss modality=text": 0.5,
            "mmscale_loss modality=text,split=eval/causal": 0.75,
            "mmscale_experts_unrouted_fraction modality=text": 0.25,
        }
        port = backend.port
    with pytest.raises(urllib.error.URLError):
        scrape(port)  # the port is free again


def test_a_port_that_is_taken_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prometheus_client")
    told: list[tuple[str, str]] = []
    with socket.create_server(("127.0.0.1", 0)) as taken, caplog.at_level(logging.WARNING):
        port = taken.getsockname()[1]
        backends = sinks(
            tmp_path,
            prometheus_address="127.0.0.1",
            prometheus_port=port,
            on_disabled=lambda *said: told.append(said),
        )
        log = MetricsLog(tmp_path, attempt=1)
        log.attach(backends)
        log.write(1, {"loss": 1.0})
        log.close()
    assert "log.prometheus_port is off from here on: " in caplog.text and "in use" in caplog.text
    assert [name for name, _ in told] == ["prometheus_port"]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0]


@pytest.mark.parametrize(
    ("name", "module", "arguments", "remedy"),
    [
        ("wandb", "wandb", {"wandb": "moma"}, "pip install 'mmscale[wandb]'"),
        ("mlflow", "mlflow", {"mlflow": "moma"}, "pip install 'mmscale[mlflow]'"),
        (
            "prometheus_port",
            "prometheus_client",
            {"prometheus_address": "127.0.0.1", "prometheus_port": 1},
            "pip install 'mmscale[prometheus]'",
        ),
        ("tensorboard", "torch.utils.tensorboard", {"tensorboard": True}, "pip install tensorboard"),
    ],
)
def test_a_package_that_is_not_installed(
    name: str,
    module: str,
    arguments: dict[str, object],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        backends = sinks(tmp_path, **arguments)
    assert f"log.{name} is off from here on" in caplog.text and remedy in caplog.text
    assert not backends.working


class Breaks(Backend):
    on_disk = False

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def write(self, step: int, values: object, *, attempt: int) -> None:
        self.calls += 1
        raise self.error

    def rolled_back(self) -> None:
        raise self.error

    def close(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ConnectionError("the service is away\nfor long"), SystemExit(1), OSError()])
def test_a_service_that_goes_away_is_said_once(
    error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Breaks(error)
    log = MetricsLog(tmp_path, attempt=1)
    log.attach(Backends({"wandb": lambda: backend}))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
        log.close()
    assert backend.calls == 1
    assert caplog.text.count("log.wandb is off from here on") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_a_request_to_stop_passes() -> None:
    backends = Backends({"wandb": lambda: Breaks(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        backends.write(1, {}, attempt=1)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the network: figures and settings are in W&B's own files, which say that it is one run."""
    pytest.importorskip("wandb", reason="wandb is an extra: pip install 'mmscale[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for attempt, lr in ((1, 0.125), (2, 0.375)):
        backends = sinks(tmp_path, wandb="moma", settings={"optim.lr": lr})
        log = MetricsLog(tmp_path, attempt=attempt)
        log.attach(backends)
        log.write(10 * attempt, {"loss": 1.25})
        log.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1 and len(files) == 2  # named by the run's id
    for file, lr in zip(files, (b"0.125", b"0.375"), strict=True):
        content = file.read_bytes()
        assert b"loss" in content and b"1.25" in content and b"optim.lr" in content and lr in content


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("step_time_s", ("mmscale_step_time_s", "", "")),
        ("tokens/image", ("mmscale_tokens", "image", "")),
        ("depth/selected_fraction/text", ("mmscale_depth_selected_fraction", "text", "")),
        ("experts/image/tokens_per_expert_cv", ("mmscale_experts_tokens_per_expert_cv", "image", "")),
        ("eval/loss", ("mmscale_loss", "", "eval")),
        ("anomalies/loss-spike", ("mmscale_anomalies_loss_spike", "", "")),
    ],
)
def test_names(key: str, name: tuple[str, str, str]) -> None:
    assert prometheus_name(key) == name
