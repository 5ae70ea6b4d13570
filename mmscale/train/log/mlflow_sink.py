"""MLflow as a sink of metrics; sinks.py starts it and keeps its errors from ending the run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from mmscale.train.log.sink_run import SinkRun

_TAG = "mmscale_run"  # tag by which a later attempt finds the MLflow run
_BATCH = 100  # largest number of parameters in a request


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI; default: files in `<run>/mlflow`.

    The service is contacted at the first write, in the sink's own thread, so that a service that does not answer delays
    nothing.

    Args:
        run: its metrics and settings are sent.
        experiment: name of the experiment.
    """

    on_disk = False

    def __init__(self, run: SinkRun, *, experiment: str) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError(f"mlflow is not installed (pip install 'mmscale[mlflow]'): {error}") from error
        self._type: Any = MlflowClient
        self._run, self._experiment = run, experiment
        self._client: Any = None
        self._id = ""

    def write(self, step: int, values: Mapping[str, float], *, attempt: int) -> None:
        """One batch of metrics; the number of the attempt is a tag."""
        from mlflow.entities import Metric

        if self._client is None:
            self._connect(attempt)
        now = int(1000 * time.time())
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def rolled_back(self) -> None:
        """Nothing: repeated steps replace no values. Both are in the history and differ in their time."""

    def close(self) -> None:
        """Mark the MLflow run as finished; the next attempt sets it to running again."""
        if self._client is not None:
            self._client.set_terminated(self._id)

    def _connect(self, attempt: int) -> None:
        """Find the MLflow run of an earlier attempt or begin one, and send the settings."""
        from mlflow.entities import Param

        client = self._type(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or self._files())
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        runs = client.search_runs([experiment], f"tags.{_TAG} = '{self._run.id}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            tags = {_TAG: self._run.id}
            self._id = client.create_run(experiment, run_name=self._run.name, tags=tags).info.run_id
        client.set_tag(self._id, "mmscale.attempt", str(attempt))
        known = runs[0].data.params if runs else {}  # MLflow does not allow changing the value of a parameter
        new = [Param(key, str(value)) for key, value in self._run.settings.items() if key not in known]
        for first in range(0, len(new), _BATCH):
            client.log_batch(self._id, params=new[first : first + _BATCH])
        for key, value in self._run.settings.items():
            if known.get(key, str(value)) != str(value):
                client.set_tag(self._id, f"changed/{key}", str(value))
        self._client = client

    def _files(self) -> str:
        """Address of a file store.

        MLflow 3.17 accepts one only with this environment variable; it prefers a database.
        """
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        address: str = (self._run.folder.resolve() / "mlflow").as_uri()
        return address
