"""Settings of logs, sinks and the profiler (`log`)."""

from __future__ import annotations

from typing import Annotated, Any

from mmscale.config.section import Count, Index, PlugIns, Port, Section, setting


class ProfileConfig(Section):
    """Steps that torch's profiler records (`log.profile`)."""

    start: Count = setting("First step that is recorded.", 10, unit="steps")
    steps: Count = setting("Number of steps; a trace takes several megabytes per step.", 3, unit="steps")
    ranks: tuple[Index, ...] = setting("Ranks that record; each writes its own file.", (0,), unit="ranks")


class LogConfig(Section):
    """Logging during training."""

    every: Count = setting("Log every n steps.", 10, unit="steps")
    layers_every: Index = setting(
        "Write figures of every layer (expert load, co-selection, depth selection, output norm) into layers.jsonl "
        "every n logged steps, and on the first and the last step; 0: never.",
        5,
        unit="logged steps",
    )
    profile: ProfileConfig | None = setting(
        "Record a few steps of a stage with torch's profiler into <run>/profile; null: off.", None
    )
    tensorboard: bool = setting("Write TensorBoard events into the run folder.", False)
    wandb: str | None = setting(
        "Weights & Biases project; null: off. A run continues if the service does not answer.", None
    )
    mlflow: str | None = setting(
        "MLflow experiment at MLFLOW_TRACKING_URI, by default files in <run>/mlflow; null: off. A run continues if the "
        "service does not answer.",
        None,
    )
    sinks: Annotated[dict[str, dict[str, Any]], PlugIns("sink")] = setting(
        "Plug-ins that get the figures of logged steps, each with its keyword arguments.", {}
    )
    prometheus_port: Port | None = setting(
        "Serve the latest figures at http://HOST:PORT/metrics on the host of rank 0; null: off.", None, unit="port"
    )
    prometheus_address: str = setting(
        "Address of the interface that serves the figures; 127.0.0.1: this host only.",
        "0.0.0.0",  # noqa: S104  # as other Prometheus exporters: the server runs on another host
    )
