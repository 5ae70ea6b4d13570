"""The data that an evaluation reads, and its checks, which need settings and files only. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.settings import config_of
from mmscale.config import Config
from mmscale.config.data.schema import MOST_NEIGHBOURS
from mmscale.data.prepared.manifest import check_tokenizers, check_vocabulary, read_blend, read_manifest
from mmscale.data.prepared.validation import read_validation
from mmscale.data.scoring.stored import check_names
from mmscale.data.stream.checks import check_evaluated_neighbours
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, UsageError, no_folder
from mmscale.inference.supported_routing import check_routing
from mmscale.tables.routings import Routing

Neighbours = int | Literal["random"]


def with_data(config: Config, folder: Path) -> Config:
    """The configuration with another data set as the only one to evaluate on."""
    described = {"prepare": None} if str(folder) != config.data.path else {}
    changed = config.data.model_copy(update={"path": str(folder), "blend": (), "validation": {}} | described)
    return config.model_copy(update={"data": changed})


def with_neighbours(config: Config, neighbours: Neighbours | None) -> Config:
    """The configuration with another number of neighbours of held-out documents; None: as it is.

    Raises:
        UsageError: the number is out of range.
    """
    if neighbours is None:
        return config
    if isinstance(neighbours, int) and not 0 <= neighbours <= MOST_NEIGHBOURS:
        raise UsageError(
            f"--neighbours {neighbours} is out of range", remedy=f"give a number from 0 to {MOST_NEIGHBOURS}, or random"
        )
    retrieval = config.data.retrieval.model_copy(update={"evaluation": neighbours})
    return config.model_copy(update={"data": config.data.model_copy(update={"retrieval": retrieval})})


def check_chosen(run: Path, step: int | None, data: Path | None, neighbours: Neighbours | None = None) -> None:
    """Refuse data that the evaluation of a run's checkpoint would refuse.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        data: a prepared data set; None: the run's own.
        neighbours: of each held-out document; None: as the run says.

    Raises:
        UsageError: the number of neighbours is out of range.
        DataError: a data set is missing, damaged, made with another vocabulary or other tokenizers, or its held-out
            documents have no neighbours.
        CheckpointError: there is no such checkpoint.
    """
    store = Store.of_run(run)
    chosen = store.choose(step)
    info = store.info(chosen)
    config = with_neighbours(config_of(info, where=store.path(chosen), run=run), neighbours)
    config = config if data is None else with_data(config, data)
    check_tokenizers_of(config, info.get("tokenizers") or {}, run, chosen)
    for folder, manifest in read_blend(config).items():
        check_evaluated_neighbours(config, folder, manifest)


def check_tokenizers_of(config: Config, learned: dict[str, str], run: Path, step: int) -> None:
    """Refuse data of other tokenizers than a checkpoint's; even the run's own data may have been prepared again.

    Args:
        config: with the data to read.
        learned: fingerprints of the checkpoint's tokenizers; empty if it is too old.
        run: the run's folder, for the message.
        step: of the checkpoint, for the message.

    Raises:
        DataError: a data set is missing, damaged, or made with another vocabulary or other tokenizers.
    """
    check_evaluated_tokenizers(config, learned, where=f"step {step} of {run}")


def check_evaluated_tokenizers(config: Config, learned: Mapping[str, str], *, where: str) -> None:
    """Refuse evaluated data of other tokenizers than a model's.

    The run's own data is compared first: validation sets are compared with it, and would be blamed for its change.

    Args:
        config: with the data to read.
        learned: fingerprints of the model's tokenizers.
        where: name of the model, for the message.

    Raises:
        DataError: a data set is missing, damaged, or made with another vocabulary or other tokenizers.
    """
    blend = read_blend(config)
    for folder, manifest in blend.items():
        check_tokenizers(folder, manifest.tokenizers, learned, where=where)
    for one in read_validation(config, blend):
        check_tokenizers(one.folder, one.manifest.tokenizers, learned, where=where)


def check_scored(folder: Path, run: Path, step: int | None, routing: Routing, name: str) -> None:
    """Refuse scores of documents by a run that cannot be computed.

    Args:
        folder: the data set.
        run: the run's folder.
        step: the checkpoint; None: the newest.
        routing: mode by which experts are assigned to tokens.
        name: of the score.

    Raises:
        DataError: the data set is missing, damaged, or was made with other tokenizers.
        UsageError: the checkpoint does not support that routing, or the name is invalid.
        CheckpointError: there is no such checkpoint.
    """
    if not run.is_dir():
        raise CheckpointError(no_folder(run), remedy="name a run folder: run.dir/run.name")
    manifest = read_manifest(folder)
    check_names(folder, [name, *(f"{name}_{modality}" for modality in manifest.modalities)])
    store = Store.of_run(run)
    chosen = store.choose(step)
    info = store.info(chosen)
    config = config_of(info, where=store.path(chosen), run=run)
    check_vocabulary(folder, manifest, Vocabulary.from_config(config.vocab))
    check_tokenizers(folder, manifest.tokenizers, info.get("tokenizers") or {}, where=f"step {chosen} of {run}")
    check_routing(run, chosen, routing)
