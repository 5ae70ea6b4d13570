"""`mmscale eval`: losses, perplexities and task accuracies of a checkpoint on held-out data, with batch routing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmscale.data.manifest import read_manifest
from mmscale.data.mixture import open_mixture
from mmscale.data.tasks import read_task
from mmscale.inference.model import open_run
from mmscale.inference.tasks import choice_accuracy
from mmscale.train.evaluate import evaluate
from mmscale.train.step import Stepper

SPLIT = "validation"


def evaluate_run(run: Path, *, step: int | None, data: Path | None, batches: int | None) -> dict[str, Any]:
    """Evaluate a run's checkpoint in this process.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        data: a prepared data set; None: the run's own.
        batches: global batches; None: the whole held-out split.

    Returns:
        `run`, `step`, `routing` ("batch": experts chose among all tokens, later ones too), `loss`, `loss/<modality>`,
        `perplexity/<modality>`, `accuracy/<task>`.
    """
    with open_run(run, step=step) as model:
        config = model.config
        if data is not None:
            changed = config.data.model_copy(update={"path": str(data), "blend": ()})
            config = config.model_copy(update={"data": changed})
        mixture = open_mixture(config, SPLIT, vocabulary=model.vocabulary)
        stepper = Stepper(config, [model.module], None, model.groups)
        losses = evaluate(config, stepper=stepper, mixture=mixture, groups=model.groups, batches=batches)
        result: dict[str, Any] = {"run": str(run), "step": model.step, "routing": "batch"} | losses
        for name in model.vocabulary.names:
            if f"loss/{name}" in losses:
                result[f"perplexity/{name}"] = math.exp(min(losses[f"loss/{name}"], 700.0))
        for source in config.data.sources:
            folder = Path(source.path)
            manifest = read_manifest(folder)
            for task in manifest.tasks:
                result[f"accuracy/{task.name}"] = choice_accuracy(model, read_task(folder, manifest, task.name))
        return result
