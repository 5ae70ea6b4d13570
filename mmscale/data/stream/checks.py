"""Checks the data of a run before any rank starts, from manifests and tables of lengths only.

It finds the same problems as ranks would when they open the data, with the same messages. Of token files only the sizes
are checked; their content is checked when it is read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.config import Config
from mmscale.config.derived import SOURCE, source_names
from mmscale.data.prepared.identity import identity_of, retrieval_of
from mmscale.data.prepared.manifest import HELD_OUT, TRAIN, Manifest, has_documents, read_blend
from mmscale.data.prepared.named_tasks import named_tasks
from mmscale.data.prepared.neighbours import table_of
from mmscale.data.prepared.table_facts import TableFacts, longer_than, table_facts
from mmscale.data.prepared.validation import naming, read_validation
from mmscale.data.stream.packing import too_long
from mmscale.errors import DataError


def check_data(config: Config) -> dict[Path, Manifest]:
    """Refuse data that ranks would refuse, without trained labels, or without the documents that evaluations need.

    Args:
        config: of the run, or of a stage of it.

    Returns:
        Manifests of the training data, by folder.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing, damaged, has no documents to train on, documents longer than a sequence,
            another vocabulary, other tokenizers than the others, or no neighbours; no label is trained on; there is
            no data to evaluate on; a task of `train.tasks` is missing.
    """
    blend = read_blend(config)
    facts = {folder: _checked(config, folder, manifest, TRAIN) for folder, manifest in blend.items()}
    _check_labels(config, facts)
    for folder, manifest in blend.items():
        if has_documents({folder: manifest}, HELD_OUT):
            _checked(config, folder, manifest, HELD_OUT)
    sets = read_validation(config, blend)
    for one in sets:
        with naming(one.name):
            _checked(config, one.folder, one.manifest, one.split)
    if config.train.eval_every and not (sets or config.train.tasks or has_documents(blend, HELD_OUT)):
        raise DataError(
            f"data: there are no held-out documents to evaluate on every {config.train.eval_every} steps",
            remedy="train without evaluation (train.eval_every=0), prepare the data with held_out above 0, or name "
            "data to evaluate on (data.validation)",
        )
    for folder, manifest in [*blend.items(), *((one.folder, one.manifest) for one in sets)]:
        if folder in blend:
            retrieval_of(config, folder, manifest)
        check_evaluated_neighbours(config, folder, manifest)
    _check_watched(config, blend)
    named_tasks(config, blend)
    return blend


def check_evaluated_neighbours(config: Config, folder: Path, manifest: Manifest) -> None:
    """Refuse data without the neighbours that evaluations read.

    Args:
        config: of the run or of the evaluation.
        folder: a data set.
        manifest: its manifest.

    Raises:
        DataError: the held-out documents have none, or they are damaged or were made for other documents.
    """
    wanted = config.data.retrieval.evaluation
    if isinstance(wanted, int) and wanted and has_documents({folder: manifest}, HELD_OUT):
        table_of(folder, HELD_OUT, of=identity_of(folder, manifest))


def _check_watched(config: Config, blend: Mapping[Path, Manifest]) -> None:
    """Refuse to wait for a loss of held-out documents of a source that has none."""
    stop = config.train.stop_when
    wanted = (config.checkpoint.keep_best, None if stop is None else stop.metric)
    for metric in wanted:
        if metric is None or metric.startswith("eval/validation/"):
            continue
        own = metric.removeprefix(f"eval/{SOURCE}") if metric.startswith(f"eval/{SOURCE}") else ""
        path = source_names(config).get(own.partition("/")[0])
        of_it = blend if path is None else {Path(path): blend[Path(path)]}
        if not has_documents(of_it, HELD_OUT):
            raise DataError(
                f"data: {metric} is never measured: {path or 'the data that is trained on'} has no held-out documents",
                remedy="watch a figure of a validation set (eval/validation/NAME/loss), or prepare the data with "
                "held_out above 0",
            )


def _checked(config: Config, folder: Path, manifest: Manifest, split: str) -> TableFacts:
    """Facts of a split's tables, after checking that every document fits into a sequence."""
    cache = None if config.data.cache is None else Path(config.data.cache)
    facts, seq_length = table_facts(folder, manifest, split, cache=cache), config.model.seq_length
    if facts.longest > seq_length:
        raise too_long(
            f"data: {folder} ({split})",
            facts.where,
            facts.longest,
            seq_length=seq_length,
            too_many=longer_than(folder, manifest, split, tokens=seq_length),
            documents=manifest.splits[split].documents,
        )
    return facts


def _check_labels(config: Config, facts: Mapping[Path, TableFacts]) -> None:
    """Refuse data without a trained label, whose losses would look normal."""
    weighs = [config.train.modality_weights.get(name, 1.0) > 0.0 for name in config.vocab.names]
    unread = {Path(source.path) for source in config.data.sources if not source.trained}
    read = {folder: found for folder, found in facts.items() if folder not in unread}
    if not any(
        weight and labels for found in read.values() for weight, labels in zip(weighs, found.labels, strict=True)
    ):
        raise DataError(
            f"data: no token of {', '.join(map(str, read))} is trained on: no document has a label in a modality "
            "with a loss",
            remedy='name modalities that documents have in their "loss", or leave it out; see train.modality_weights',
        )
