"""The inputs of a data set: its documents, cut into parts, and the record of everything that affects its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mmscale.config import ImageTokenizerConfig, PrepareConfig
from mmscale.config.plugins import use_of
from mmscale.data import digests
from mmscale.data.documents.plugin_reader import scan_with
from mmscale.data.documents.readers import list_files, list_local, scan_files
from mmscale.data.documents.schema import DocumentSlice
from mmscale.data.documents.slices import ReadSettings
from mmscale.data.prepared.canaries import CanarySlice
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError

_ENCODING = 1  # increase it when the same documents would get other ids


def slices_of(settings: PrepareConfig) -> list[list[DocumentSlice]]:
    """The input, cut into parts of at most `data.prepare.part_documents`; small files share a part.

    Raises:
        DataError: there are no files or no documents, or a file cannot be read.
    """
    slices: Sequence[DocumentSlice]
    if (use := use_of(settings, "reader", key="data.prepare.reader")) is not None:
        slices = scan_with(
            use, list_local(settings.documents), slice_records=settings.part_documents, ignore=settings.ignore
        )
    else:
        files = list_files(settings.documents)
        slices = scan_files(
            files, slice_records=settings.part_documents, threads=settings.workers, settings=_reading(settings)
        )
    parts: list[list[DocumentSlice]] = []
    room = 0
    for piece in slices:
        if piece.count > room:
            parts.append([])
            room = settings.part_documents
        parts[-1].append(piece)
        room -= piece.count
    if not parts:
        raise DataError("data: the document files are empty", remedy="name files with documents")
    if settings.canaries is not None:
        parts.append([CanarySlice(settings.canaries)])
    return parts


def _reading(settings: PrepareConfig) -> ReadSettings:
    return ReadSettings(settings.ignore, settings.captions, settings.half_pairs, settings.columns)


def listing(slices: Sequence[Sequence[DocumentSlice]]) -> str:
    """Digest of the documents, as they are cut into parts."""
    return hashlib.sha256(json.dumps([[piece.identity for piece in part] for part in slices]).encode()).hexdigest()


def source_of(settings: PrepareConfig, vocabulary: Vocabulary, documents: str) -> dict[str, Any]:
    """The record of a data set's inputs: everything that affects its bytes, and a digest of it."""
    fixed = settings.model_dump(mode="json", exclude={"workers", "strict", "documents"})
    # the digest depends on the content of the file, not on its path
    fixed["text"]["load"] = digests.of_path(settings.text.load, "data.prepare.text.load")
    if fixed["text"]["kind"] == "bpe":  # omitted, as in versions that had no other kind
        del fixed["text"]["kind"]
    for section in ("text", "image"):
        if not fixed[section]["kind_args"]:
            del fixed[section]["kind_args"]
    fixed["image"]["path"] = digests.of_path(settings.image.path, "data.prepare.image.path")
    # A setting of older versions in its place, so that records and digests of their data sets stay valid.
    fixed |= {"augment": 0} | {key: fixed.pop(key) for key in ("max_document_tokens", "part_documents")}
    _leave_out_defaults(fixed["image"])
    questions = settings.tasks.items()
    fixed["tasks"] = {name: digests.of_path(file, f"data.prepare.tasks.{name}") for name, file in questions}
    if fixed["reader"] == "suffix":
        del fixed["reader"]
    for key in ("captions", "half_pairs", "id_offset"):
        if fixed[key] == PrepareConfig().model_dump(mode="json")[key]:
            del fixed[key]  # omitted, so that the digests of data sets of older versions stay valid
    for key in ("canaries", "columns", "ignore", "modalities", "reader_args", "tasks"):
        if not fixed[key]:
            del fixed[key]
    for name, own in fixed.get("modalities", {}).items():
        own["load"] = digests.of_path(own.get("load"), f"data.prepare.modalities.{name}.load")
    content = {
        "encoding": _ENCODING,
        "vocabulary": dict(zip(vocabulary.names, map(list, vocabulary.ranges), strict=True)),
        "settings": fixed,
        "documents": documents,
    }
    if vocabulary.marked:
        content["marked"] = list(vocabulary.marked)
    if vocabulary.reserved:
        content["reserved"] = True
    return content | {"digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _leave_out_defaults(image: dict[str, Any]) -> None:
    """Omit default values, so that the digests of data sets of older versions stay valid."""
    for key in ("residual", "fit", "background", "damaged"):
        if image[key] == ImageTokenizerConfig().model_dump(mode="json")[key]:
            del image[key]
