"""What `mmscale eval` measures of any model on held-out data: losses, perplexities, each source's own, and tasks.

How a model computes losses and log-probabilities is its scorer's business: evaluate.py's for a run's checkpoint,
checkpoints_tools/hf_evaluate.py's for an exported folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.manifest import has_documents, read_manifest
from mmscale.data.tasks import read_task
from mmscale.inference.tasks import choice_accuracy

SPLIT = "validation"


class Scorer(Protocol):
    """A model under one routing."""

    def losses(self, config: Config) -> dict[str, float]:
        """`loss`, `loss/<modality>`, `z_loss` on the held-out split of a configuration's data."""
        ...

    def log_probabilities(self, documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """For each document [tokens, vocabulary]: log-probabilities of the next token."""
        ...


def measured(scorer: Scorer, config: Config) -> dict[str, float]:
    """`loss`, `loss/<modality>`, `z_loss`, `perplexity/<modality>`, `accuracy/<task>`; for a blend `source/<name>/...`.

    Args:
        scorer: the model.
        config: names the data.

    Raises:
        DataError: the data is missing or damaged.
    """
    losses = scorer.losses(config)
    result = losses | _perplexities(losses)
    if len(config.data.sources) > 1:
        for name, place in _named(config).items():
            if not has_documents({place: read_manifest(place)}, SPLIT):
                continue
            own = scorer.losses(with_data(config, place))
            result |= {f"source/{name}/{key}": value for key, value in (own | _perplexities(own)).items()}
    for source in config.data.sources:
        folder = Path(source.path)
        manifest = read_manifest(folder)
        for task in manifest.tasks:
            items = read_task(folder, manifest, task.name)
            result[f"accuracy/{task.name}"] = choice_accuracy(items, log_probabilities=scorer.log_probabilities)
    return result


def with_data(config: Config, folder: Path) -> Config:
    """The configuration with one other data set."""
    changed = config.data.model_copy(update={"path": str(folder), "blend": ()})
    return config.model_copy(update={"data": changed})


def _named(config: Config) -> dict[str, Path]:
    """Data sets of a blend by the names of their folders, or by their paths where those repeat."""
    folders = [Path(source.path) for source in config.data.sources]
    names = [folder.name for folder in folders]
    return dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders, strict=True))


def _perplexities(losses: dict[str, float]) -> dict[str, float]:
    """`perplexity/<modality>` of every `loss/<modality>`."""
    return {
        name.replace("loss/", "perplexity/", 1): math.exp(min(loss, 700.0))
        for name, loss in losses.items()
        if name.startswith("loss/")
    }
