"""The weights of a run and those of the auxiliary routers that were trained for them, as one list of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mmscale.checkpoint.settings import config_of
from mmscale.checkpoint.tensors import CheckpointTensors, TensorEntry, open_tensors
from mmscale.train.stages.origin import find_routers, folder_of


class RunWeights:
    """Weights of a main checkpoint. Routers of the auxiliary stage replace those of a joint run.

    Args:
        run: the run's folder.
        step: the main checkpoint; None: the newest.

    Raises:
        CheckpointError: there is none, or one of the two is damaged.

    Attributes:
        config: the configuration that the main checkpoint was written with.
        stream: settings of the order of its data so far (`mmscale.data.stream.segments`); empty in older checkpoints.
    """

    def __init__(self, run: Path, step: int | None) -> None:
        self.main = open_tensors(run, step)
        self.path, self.step = self.main.path, self.main.step
        self.config = config_of(self.main.info(), where=self.path, run=run)
        self.stream: list[dict[str, Any]] = self.main.common().get("progress", {}).get("stream", [])
        self.parents = [self.main]
        self._of = dict.fromkeys(self.main.names(weights=True), self.main)
        if (routers := find_routers(run, self.step)) is not None:
            stage = open_tensors(folder_of(run), int(routers[0].name.removeprefix("step_")))
            self.parents.append(stage)
            self._of |= dict.fromkeys(stage.names(weights=True), stage)

    def names(self) -> list[str]:
        """Names of all weights, sorted."""
        return sorted(self._of)

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""
        return self._source(name).entry(name)

    def read(self, name: str) -> Tensor:
        """A tensor, on the host."""
        return self._source(name).read(name)

    def _source(self, name: str) -> CheckpointTensors:
        return self._of.get(name, self.main)  # which raises the error for an unknown name
