"""What is wrong with the data of a run, found before any rank starts: from manifests and tables of lengths alone.

It finds what ranks would find when they open the data, with the same words. Token files are as long as their manifest
says; what stands in them is checked when it is read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmscale.config import Config
from mmscale.data.manifest import (
    FIRST_MODALITY,
    HELD_OUT,
    TRAIN,
    Manifest,
    checked_table,
    has_documents,
    parts_of,
    read_blend,
)
from mmscale.data.packing import check_lengths
from mmscale.data.validation import naming, read_validation
from mmscale.errors import DataError


def check_data(config: Config) -> dict[Path, Manifest]:
    """Refuse data that the ranks would refuse, that nothing would be learned from, or that cannot be evaluated on.

    Args:
        config: of the run, or of a stage of it.

    Returns:
        Manifests of the data that is trained on, by folder.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing, damaged, has no documents to train on, documents longer than a sequence,
            another vocabulary, or other tokenizers than the others; nothing of them is trained on; there is nothing
            to evaluate on.
    """
    blend = read_blend(config)
    tables = {folder: _tables(config, folder, manifest, TRAIN) for folder, manifest in blend.items()}
    _check_labels(config, tables)
    for folder, manifest in blend.items():
        if has_documents({folder: manifest}, HELD_OUT):
            _tables(config, folder, manifest, HELD_OUT)
    sets = read_validation(config, blend)
    for one in sets:
        with naming(one.name):
            _tables(config, one.folder, one.manifest, one.split)
    if config.train.eval_every and not sets and not has_documents(blend, HELD_OUT):
        raise DataError(
            f"data: there are no held-out documents to evaluate on every {config.train.eval_every} steps",
            remedy="train without evaluation (train.eval_every=0), prepare the data with held_out above 0, or name "
            "data to evaluate on (data.validation)",
        )
    return blend


def _tables(config: Config, folder: Path, manifest: Manifest, split: str) -> list[np.ndarray]:
    """Tables of a split's parts, as `read_table` gives them, whose documents all fit a sequence."""
    tables = [checked_table(folder, part, manifest.modalities) for part in parts_of(folder, manifest, split)]
    lengths = np.concatenate([table[:, :-1].sum(axis=1) for table in tables])
    check_lengths(lengths, seq_length=config.model.seq_length, what=f"data: {folder} ({split})")
    return tables


def _check_labels(config: Config, tables: Mapping[Path, list[np.ndarray]]) -> None:
    """Refuse data without a trained label: its losses would look healthy."""
    weighs = np.array([config.train.modality_weights.get(name, 1.0) > 0.0 for name in config.vocab.names])
    unread = {Path(source.path) for source in config.data.sources if not source.weight}
    read = {folder: found for folder, found in tables.items() if folder not in unread}
    if not any((_labels(table).any(axis=0) & weighs).any() for found in read.values() for table in found):
        raise DataError(
            f"data: no token of {', '.join(map(str, read))} is trained on: no document has a label in a modality "
            "with a loss",
            remedy='name modalities that documents have in their "loss", or leave it out; see train.modality_weights',
        )


def _labels(table: np.ndarray) -> np.ndarray:
    """Trained labels of each document and modality [documents, modalities]; its first token is nobody's label."""
    modalities = table.shape[1] - 1
    labels = table[:, :modalities].copy()
    labels[:, FIRST_MODALITY] -= 1
    trained: np.ndarray = labels * ((table[:, modalities, None] >> np.arange(modalities)) & 1)
    return trained
