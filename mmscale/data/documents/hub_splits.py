"""The split of a table from its file name, by the conventions of the Hugging Face Hub.

`data/train-00000-of-00002.parquet`, `train.parquet` and `train/0.parquet` belong to the split train. No pyarrow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from mmscale.data.documents.document_files import File
from mmscale.data.documents.schema import TRAIN, VALIDATION, SplitName
from mmscale.errors import DataError

TABLES = (".parquet", ".arrow")
_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_NAMES = {  # as in the Hub's documentation
    TRAIN: (TRAIN, "training"),
    VALIDATION: (VALIDATION, "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_FOLDERS = (TRAIN, VALIDATION, "test")  # `dev` and `val` may be any folder


def named_split(file: File) -> str:
    """The split in the name of a table or of its folder: train, validation or another; "" if there is none."""
    path = PurePosixPath(str(file))
    if path.suffix not in TABLES:
        return ""
    if shard := _SHARD.fullmatch(path.stem):
        return _SPLITS.get(shard[1], shard[1])
    return _SPLITS.get(path.stem) or (path.parent.name if path.parent.name in _FOLDERS else "")


def refuse_other_splits(files: Sequence[File], pattern: str) -> None:
    """Refuse files matched by one pattern if some are of train or validation and others of another split.

    Raises:
        DataError: there are such files.
    """
    found = {split: file for file in files if (split := named_split(file))}
    others = sorted(found.keys() - {TRAIN, VALIDATION})
    if others and len(found) > 1:
        raise DataError(
            f"documents: {pattern} has a split {others[0]} ({found[others[0]].name}) besides {TRAIN} or {VALIDATION}",
            remedy="name the files of the splits that you want, e.g. data/train-*.parquet",
        )


def splits_of(files: Iterable[File]) -> dict[File, SplitName]:
    """The split of the files whose names say train or validation, if some say validation.

    Otherwise a share of the documents is held out as usual, so files named train are not bound to a split.
    """
    found: dict[File, SplitName] = {}
    for file in files:
        split = named_split(file)
        if split == VALIDATION:
            found[file] = "validation"
        elif split == TRAIN:
            found[file] = "train"
    return found if "validation" in found.values() else {}
