"""The tasks that `mmscale eval --task NAME` has built in: functions from a model and its data to entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmscale.config import Config
from mmscale.inference.memorisation import memorisation
from mmscale.inference.scores import Scorer

# By name, as in `EVAL_TASKS`. Arguments: the model, its settings with the data, and optimizer steps; None: unknown.
BUILT_IN_TASKS: dict[str, Callable[[Scorer, Config, int | None], dict[str, Any]]] = {"memorisation": memorisation}


def built_in(names: Sequence[str], scorer: Scorer, config: Config, *, step: int | None) -> dict[str, Any]:
    """The entries of all tasks.

    Args:
        names: keys of `EVAL_TASKS`.
        scorer: the model.
        config: its settings, with the data to evaluate on.
        step: optimizer steps that it has done; None: unknown.

    Raises:
        DataError: the data lacks what a task needs.
    """
    result: dict[str, Any] = {}
    for name in names:
        result |= BUILT_IN_TASKS[name](scorer, config, step)
    return result
