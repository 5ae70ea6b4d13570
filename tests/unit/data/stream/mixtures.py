"""Mixtures of small data sets in every order, for tests of the stream, its cache and the loader."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.source import Source
from mmscale.data.vocab import PAD, Vocabulary
from mmscale.tables.settings import DATA_ORDERS
from tests.unit.data.corpora import VOCABULARY

SEQ = 128
DOCUMENTS = 120
OPTIONS: dict[str, Any] = {"seq_length": SEQ, "micro_batch_size": 4, "seed": 3, "pack_window": 40, "deal_window": 16}


SMALL_BLOCKS = dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=20)


def open_sources(*folders: Path, vocabulary: Vocabulary = VOCABULARY) -> list[Source]:
    return [Source(folder, split="train", vocabulary=vocabulary) for folder in folders]


def mix(*folders: Path, **options: Any) -> Mixture:
    return Mixture(open_sources(*folders), VOCABULARY, **{**OPTIONS, **options})


def digest(batch: MicroBatch) -> str:
    content = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        content.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return content.hexdigest()


def documents_in(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Token ids of every document, cut out by document_ids alone."""
    found = []
    for row, ids in zip(batch.tokens, batch.document_ids, strict=True):
        pieces = np.split(row, np.flatnonzero(np.diff(ids)) + 1)
        found += [tuple(piece.tolist()) for piece in pieces if piece[0] != PAD]
    return found
