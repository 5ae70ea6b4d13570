"""`mmscale eval`: losses, perplexities and task accuracies of a checkpoint on held-out data, under any routing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.data.manifest import read_manifest
from mmscale.data.mixture import open_mixture
from mmscale.data.tasks import read_task
from mmscale.inference.model import RunModel, open_run
from mmscale.inference.tasks import choice_accuracy
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.mixed_modal import Routing
from mmscale.train.auxiliary import figures, table
from mmscale.train.evaluate import evaluate
from mmscale.train.step import Stepper

SPLIT = "validation"


def evaluate_run(
    run: Path, *, step: int | None, data: Path | None, batches: int | None, routing: Routing = Routing.BATCH
) -> dict[str, Any]:
    """Evaluate a run's checkpoint in this process.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        data: a prepared data set; None: the run's own.
        batches: global batches; None: the whole held-out split.
        routing: who decides which experts take a token.

    Returns:
        `run`, `step`, `routing`, `loss`, `loss/<modality>`, `perplexity/<modality>`, `accuracy/<task>`; with several
        data sets `source/<name>/loss` and the like. With causal routings also `batch`, the losses of batch routing
        on the same data, and `gap`, how much larger the causal ones are; with `causal` also `routers`, the figures
        of the auxiliary routers' decisions against the true choice, a row for each layer and modality.

    Raises:
        UsageError: the checkpoint has nothing for that routing.
    """
    with open_run(run, step=step) as model:
        model.require(routing)
        config = model.config
        if data is not None:
            config = _with_data(config, data)
        losses = _losses(model, config, batches, routing)
        result: dict[str, Any] = {"run": str(run), "step": model.step, "routing": routing.value} | losses
        result |= _perplexities(losses)
        if len(config.data.sources) > 1:
            for name, place in _named(config).items():
                own = _losses(model, _with_data(config, place), batches, routing)
                result |= {f"source/{name}/{key}": value for key, value in (own | _perplexities(own)).items()}
        for source in config.data.sources:
            folder = Path(source.path)
            manifest = read_manifest(folder)
            for task in manifest.tasks:
                items = read_task(folder, manifest, task.name)
                result[f"accuracy/{task.name}"] = choice_accuracy(model, items, routing=routing)
        if not routing.leaks and model.config.model.routes:
            result |= _against_batch(model, config, batches, losses, routing)
        return result


def _against_batch(
    model: RunModel, config: Config, batches: int | None, losses: dict[str, float], routing: Routing
) -> dict[str, Any]:
    """What causality costs, and how well auxiliary routers predict."""
    learning = RouterLearning(gradients=False) if routing is Routing.CAUSAL else None
    leaking = _losses(model, config, batches, Routing.BATCH, learning)
    found: dict[str, Any] = {
        "batch": leaking,
        "gap": {name: losses[name] - value for name, value in leaking.items() if name != "z_loss"},
    }
    if learning is not None:
        found["routers"] = table(figures(learning, model.groups))
    return found


def _losses(
    model: RunModel, config: Config, batches: int | None, routing: Routing, learning: RouterLearning | None = None
) -> dict[str, float]:
    mixture = open_mixture(config, SPLIT, vocabulary=model.vocabulary)
    stepper = Stepper(config, [model.module], None, model.groups)  # type: ignore[list-item]
    return evaluate(
        config,
        stepper=stepper,
        mixture=mixture,
        groups=model.groups,
        batches=batches,
        routing=routing,
        learning=learning,
    )


def _named(config: Config) -> dict[str, Path]:
    """Data sets of a blend by the names of their folders, or by their paths where those repeat."""
    folders = [Path(source.path) for source in config.data.sources]
    names = [folder.name for folder in folders]
    return dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders, strict=True))


def _with_data(config: Config, folder: Path) -> Config:
    changed = config.data.model_copy(update={"path": str(folder), "blend": ()})
    return config.model_copy(update={"data": changed})


def _perplexities(losses: dict[str, float]) -> dict[str, float]:
    """`perplexity/<modality>` of every `loss/<modality>`."""
    return {
        name.replace("loss/", "perplexity/", 1): math.exp(min(loss, 700.0))
        for name, loss in losses.items()
        if name.startswith("loss/")
    }
