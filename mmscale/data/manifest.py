"""What a prepared data set says of itself: vocabulary, tokenizers, splits, parts, counts.

The manifest is written last: a folder without one is not a data set. Reading checks every part's size, so a truncated
file is found before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mmscale import bounded
from mmscale.config import Config, DataSource
from mmscale.data.arrays import read_array
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMAT = 1
MOST_BYTES = 1 << 30  # of a manifest: it has 200 bytes for each part
NO_TOKENIZER = "none"  # fingerprint of the image tokenizer of a data set without images
TRAIN, HELD_OUT = "train", "validation"  # splits that `mmscale data prepare` writes
# Documents start with a token of the first modality: BOS, or BOI where there is none. It is nobody's label.
FIRST_MODALITY = 0
_AGAIN = "run `mmscale data prepare` again: only damaged parts are made anew after you delete them"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError("it leads out of the folder")
    return name


# A file of the data set, relative to its folder.
Inside = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Part(_Entry):
    """One Megatron IndexedDataset (`<prefix>.bin`, `<prefix>.idx`) and its per-document table (`<prefix>.meta.npy`).

    The table is int64 [documents, modalities + 1]: tokens of each modality, then the loss mask as bits
    (bit m set: labels of modality m are trained on).
    """

    prefix: Inside  # relative to the data set's folder, without suffix
    documents: Count
    tokens: dict[str, Count]  # tokens per modality
    bin_bytes: Count
    idx_bytes: Count


class Split(_Entry):
    """One split: its parts in order."""

    parts: tuple[Part, ...]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(part.documents for part in self.parts)

    def tokens(self, modality: str) -> int:
        """Tokens of a modality in this split."""
        return sum(part.tokens.get(modality, 0) for part in self.parts)


class Task(_Entry):
    """A question the data defines: documents of which one span is the answer (see `<file>`: JSONL)."""

    name: str
    file: Inside  # JSONL: {"ids": [...], "answer": [start, end], "choices": [[ids], ...]}, relative
    kind: Literal["choice"] = "choice"


class Manifest(_Entry):
    """The content of manifest.json."""

    format: int
    modalities: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    vocabulary: str  # Vocabulary.fingerprint
    text_tokenizer: str  # fingerprint
    image_tokenizer: str  # fingerprint
    tokens_per_image: Count
    splits: dict[str, Split]
    tasks: tuple[Task, ...] = ()
    rejected: int = 0
    source: str = ""  # digest of the listing and settings it was prepared from

    @property
    def tokenizers(self) -> dict[str, str]:
        """Fingerprints: what an id means is decided by these and by the vocabulary."""
        return {"text_tokenizer": self.text_tokenizer, "image_tokenizer": self.image_tokenizer}

    def share(self, split: str = "train") -> dict[str, float]:
        """Share of each modality in a split's tokens."""
        counts = {name: self.splits[split].tokens(name) for name in self.modalities}
        total = sum(counts.values())
        return {name: count / total if total else 0.0 for name, count in counts.items()}


def named_sources(config: Config) -> tuple[DataSource, ...]:
    """The data sets of a configuration.

    Raises:
        ConfigError: there are none.
    """
    if not config.data.sources:
        raise ConfigError(
            "data: neither data.path nor data.blend is set", remedy="set data.path to a prepared data set"
        )
    return config.data.sources


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a prepared data set.

    Raises:
        DataError: the folder, the manifest or a part is missing, damaged or truncated.
    """
    file = folder / MANIFEST
    prepare = "run `mmscale data prepare`"
    if not folder.is_dir():
        raise DataError(f"data: there is no folder {folder}", remedy=f"{prepare} or correct data.path")
    if not file.is_file():
        raise DataError(f"data: {folder} is not a prepared data set (no {MANIFEST})", remedy=f"{prepare} to its end")
    try:
        manifest = Manifest.model_validate(bounded.read_json(file, most=MOST_BYTES))
    except (OSError, ValueError) as error:  # ValidationError is one
        raise DataError(f"data: {file} is damaged: {str(error).splitlines()[0]}", remedy=f"{prepare} again") from error
    if manifest.format != FORMAT:
        raise DataError(
            f"data: {file} has format {manifest.format}, this version reads {FORMAT}", remedy=f"{prepare} again"
        )
    for split in manifest.splits.values():
        for part in split.parts:
            for suffix, size in ((".bin", part.bin_bytes), (".idx", part.idx_bytes)):
                path = folder / (part.prefix + suffix)
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                    raise DataError(f"data: {path} {state}", remedy=f"{prepare} again: only this part is made anew")
    return manifest


def read_blend(config: Config) -> dict[Path, Manifest]:
    """Manifests of a configuration's data sets by folder, of its vocabulary and of one kind of tokenizers.

    Raises:
        ConfigError: none is named.
        DataError: one is missing, damaged, or was prepared with another vocabulary or with other tokenizers than the
            others.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    blend = {Path(entry.path): read_manifest(Path(entry.path)) for entry in named_sources(config)}
    for folder, manifest in blend.items():
        check_vocabulary(folder, manifest, vocabulary)
    common_tokenizers({folder: manifest.tokenizers for folder, manifest in blend.items()})
    return blend


def has_documents(blend: Mapping[Path, Manifest], split: str) -> bool:
    """Whether any data set has documents in a split."""
    return any(split in manifest.splits and manifest.splits[split].documents for manifest in blend.values())


def parts_of(folder: Path, manifest: Manifest, split: str) -> tuple[Part, ...]:
    """The parts of a split that have documents.

    Raises:
        DataError: there is no such split, or none of its parts has any.
    """
    if split not in manifest.splits:
        raise DataError(f"data: {folder} has no split {split!r}, only {', '.join(manifest.splits)}", remedy=_AGAIN)
    found = tuple(part for part in manifest.splits[split].parts if part.documents)
    if not found:
        raise DataError(
            f"data: the split {split!r} of {folder} has no documents",
            remedy="prepare more documents, or change data.prepare.held_out",
        )
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest so that it is there whole or not at all."""
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)


def check_vocabulary(folder: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
    """Refuse data whose ids mean something else than the configuration's.

    Raises:
        DataError: the vocabularies differ.
    """
    if manifest.vocabulary != vocabulary.fingerprint:
        has = ", ".join(f"{n} {a}..{b - 1}" for n, (a, b) in zip(manifest.modalities, manifest.ranges, strict=True))
        wants = ", ".join(f"{n} {a}..{b - 1}" for n, (a, b) in zip(vocabulary.names, vocabulary.ranges, strict=True))
        raise DataError(
            f"data: {folder} was prepared with another vocabulary ({has}) than the configuration's ({wants})",
            remedy="prepare it with this configuration or correct vocab.modalities",
        )


def check_tokenizers(folder: Path, found: Mapping[str, str], wanted: Mapping[str, str], *, where: str) -> None:
    """Refuse data whose ids were made by other tokenizers than a model's, though the vocabularies agree.

    Args:
        folder: the data set.
        found: its `Manifest.tokenizers`.
        wanted: fingerprints likewise; one that is missing is not compared, and neither is the image tokenizer where one
            side has no images.
        where: whose they are.

    Raises:
        DataError: one differs.
    """
    for name, fingerprint in found.items():
        if wanted.get(name, NO_TOKENIZER) not in (fingerprint, NO_TOKENIZER) and fingerprint != NO_TOKENIZER:
            raise DataError(
                f"data: the {name.replace('_', ' ')} of {folder} ({fingerprint}) is another than that of {where} "
                f"({wanted[name]})",
                remedy="name a data set that was prepared with the tokenizers of training",
            )


def common_tokenizers(blend: Mapping[Path, Mapping[str, str]]) -> dict[str, str]:
    """Fingerprints of the tokenizers of a blend; a data set without images does not count for those of images.

    Args:
        blend: folders and their `Manifest.tokenizers`.

    Raises:
        DataError: two data sets were made by different tokenizers.
    """
    found: dict[str, str] = {}
    for folder, own in blend.items():
        check_tokenizers(folder, own, found, where="the blend's data before it")
        known = {name: value for name, value in own.items() if value != NO_TOKENIZER}
        found = {**own, **found, **known}
    return found


def read_table(folder: Path, part: Part) -> np.ndarray:
    """Per-document table of a part, int64 [documents, modalities + 1].

    Raises:
        DataError: the table is missing or does not fit the part.
    """
    file = folder / f"{part.prefix}.meta.npy"
    try:
        table = read_array(file)
    except (OSError, ValueError) as error:
        raise DataError(f"data: {file} cannot be read: {error}", remedy="run `mmscale data prepare` again") from error
    if table.shape != (part.documents, len(part.tokens) + 1):
        raise DataError(
            f"data: {file} has shape {table.shape}, its part has {part.documents} documents",
            remedy="run `mmscale data prepare` again",
        )
    return table


def checked_table(folder: Path, part: Part, modalities: tuple[str, ...]) -> np.ndarray:
    """A part's table, checked against the manifest.

    Raises:
        DataError: the table is missing or does not fit.
    """
    table = read_table(folder, part)
    sums = table[:, :-1].sum(axis=0)
    if tuple(sums) != tuple(part.tokens.get(name, 0) for name in modalities):
        raise DataError(
            f"data: {folder / part.prefix}.meta.npy does not add up to the manifest's counts", remedy=_AGAIN
        )
    if (table[:, :-1] < 0).any() or (table[:, FIRST_MODALITY] < 1).any():
        raise DataError(
            f"data: {folder / part.prefix}.meta.npy has a document without a {modalities[0]} token; "
            "a document starts with one",
            remedy=_AGAIN,
        )
    return table
