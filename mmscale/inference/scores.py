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
from mmscale.data.manifest import HELD_OUT, has_documents, read_manifest
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.passes import SOURCES, open_passes
from mmscale.data.tasks import read_task
from mmscale.data.vocab import Vocabulary
from mmscale.inference.tasks import choice_accuracy
from mmscale.train.held_out import VALIDATION


class Scorer(Protocol):
    """A model under one routing."""

    def losses(self, data: Mixture) -> dict[str, float]:
        """`loss`, `loss/<modality>`, `z_loss` on one pass over held-out data."""
        ...

    def log_probabilities(self, documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """For each document [tokens, vocabulary]: log-probabilities of the next token."""
        ...


def measured(scorer: Scorer, config: Config) -> dict[str, float]:
    """Losses on held-out data, perplexities, each source's own, and accuracies of tasks.

    Args:
        scorer: the model.
        config: names the data.

    Returns:
        `loss`, `loss/<modality>`, `z_loss`, `perplexity/<modality>`, `accuracy/<task>`; for a blend
        `source/<name>/...`; for each set of `data.validation` `validation/<name>/...`.

    Raises:
        DataError: the data is missing or damaged, or there is none to evaluate on.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    result: dict[str, float] = {}
    for prefix, data in passes_of(config).items():
        losses = scorer.losses(data)
        result |= {f"{prefix}{key}": value for key, value in (losses | _perplexities(losses)).items()}
    if len(config.data.sources) > 1:
        for name, place in _named(config).items():
            if not has_documents({place: read_manifest(place)}, HELD_OUT):
                continue
            own = scorer.losses(open_mixture(config, HELD_OUT, vocabulary=vocabulary, folder=place))
            result |= {f"source/{name}/{key}": value for key, value in (own | _perplexities(own)).items()}
    folders = [("", Path(source.path)) for source in config.data.sources]
    folders += [(_prefix(name), Path(path)) for name, path in config.data.validation.items()]
    for prefix, folder in folders:
        manifest = read_manifest(folder)
        for task in manifest.tasks:
            items = read_task(folder, manifest, task.name)
            accuracy = choice_accuracy(items, log_probabilities=scorer.log_probabilities)
            result[f"{prefix}accuracy/{task.name}"] = accuracy
    return result


def passes_of(config: Config) -> dict[str, Mixture]:
    """What is evaluated, by the prefix of its keys: "" for the sources' held-out documents, `validation/<name>/`.

    Raises:
        DataError: the data is missing or damaged, or there is none to evaluate on.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    found = open_passes(config, vocabulary=vocabulary)
    if not found:
        open_mixture(config, HELD_OUT, vocabulary=vocabulary)  # raises, and says what is missing
    return {_prefix(name): data for name, data in found.items()}


def _prefix(name: str) -> str:
    return f"{VALIDATION}{name}/" if name != SOURCES else ""


def with_data(config: Config, folder: Path) -> Config:
    """The configuration with one other data set, and nothing else to evaluate on."""
    changed = config.data.model_copy(update={"path": str(folder), "blend": (), "validation": {}})
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
