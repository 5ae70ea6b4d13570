"""What plug-ins import from mmscale. These names stay where they are when files move; docs/extending/ explains them.

Nothing is imported before it is asked for: a schedule needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmscale.data.modalities.image_plugin import ImageCodes
    from mmscale.inference.scores import Scorer, TaskRun
    from mmscale.train.log.sink_run import SinkRun
    from mmscale.train.optim.adam import HostFusedAdam
    from mmscale.train.optim.schedule import Point
    from mmscale.train.plugin_hooks import HookRun, TrainingHook
    from mmscale.train.stage_state import StageState
    from mmscale.train.steps.loss import Objective, cross_entropy
    from mmscale.train.steps.step_report import StepReport

__all__ = [
    "HookRun",
    "HostFusedAdam",
    "ImageCodes",
    "Objective",
    "Point",
    "Scorer",
    "SinkRun",
    "StageState",
    "StepReport",
    "TaskRun",
    "TrainingHook",
    "cross_entropy",
]

_FOUND_IN = {
    "HookRun": "mmscale.train.plugin_hooks",
    "HostFusedAdam": "mmscale.train.optim.adam",
    "ImageCodes": "mmscale.data.modalities.image_plugin",
    "Objective": "mmscale.train.steps.loss",
    "Point": "mmscale.train.optim.schedule",
    "Scorer": "mmscale.inference.scores",
    "SinkRun": "mmscale.train.log.sinks",
    "StageState": "mmscale.train.stage_state",
    "StepReport": "mmscale.train.steps.step_report",
    "TaskRun": "mmscale.inference.scores",
    "TrainingHook": "mmscale.train.plugin_hooks",
    "cross_entropy": "mmscale.train.steps.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FOUND_IN[name]), name)
