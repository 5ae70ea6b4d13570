"""The manifest of a prepared data set: vocabulary, tokenizers, splits, parts, counts.

The manifest is written last: a folder without one is not a data set. Reading it checks the size of every part, so a
truncated file is found before the first step.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mmscale import bounded
from mmscale.config import Config, DataSource
from mmscale.data.arrays import read_array
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import ConfigError, DataError, no_folder, shell_command
from mmscale.runtime.atomic_files import write_atomic

MANIFEST = "manifest.json"
FORMAT = 2  # version 1 had the tokenizers of text and images only, each in a separate field
MOST_BYTES = 1 << 30  # largest manifest; it has 200 bytes for each part
NO_TOKENIZER = "none"  # fingerprint of a tokenizer that a data set does not have
TEXT = "text"  # key of the tokenizer of the first modality, whatever its name in the vocabulary
TRAIN, HELD_OUT = "train", "validation"  # splits that `mmscale data prepare` writes
# Documents start with a token of the first modality (BOS, or BOI if there is no BOS), which is never a label.
FIRST_MODALITY = 0
_AGAIN = "run `mmscale data prepare` again: only damaged parts are made again after you delete them"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError("it leads out of the folder")
    return name


# The path of a file of the data set, relative to its folder.
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
    # For bits per byte, over documents whose text is trained on: UTF-8 bytes (None: not counted), and labels of the
    # first modality.
    text_bytes: Count | None = None
    text_labels: Count = 0
    # Set if the .bin is a link to a file of a Megatron corpus, whose documents may be in another order: added to its
    # ids. None: mmscale wrote the .bin, and its documents follow one another.
    id_offset: Count | None = None
    # Set if it has chat documents: `<prefix>.mask`, a bit per token in the order of the .bin file (1: trained on as a
    # label), and `<prefix>.labels.npy`, int64 [documents, modalities], the number of such labels.
    masked: bool = False

    @property
    def listing(self) -> dict[str, Any]:
        """The entries that identities of data are computed from: the fields of all versions, and newer ones if set."""
        own: dict[str, Any] = {} if self.id_offset is None else {"id_offset": self.id_offset}
        own |= {"masked": True} if self.masked else {}
        return self.model_dump(exclude={"text_bytes", "text_labels", "id_offset", "masked"}) | own


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
    """A question that the data set defines: documents of which one span is the answer (`<file>`: JSONL)."""

    name: str
    file: Inside  # JSONL: {"ids": [...], "answer": [start, end], "choices": [[ids], ...]}, relative
    kind: Literal["choice", "exact"] = "choice"


class Manifest(_Entry):
    """The content of manifest.json."""

    format: int
    modalities: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    vocabulary: str  # Vocabulary.fingerprint
    marked: tuple[str, ...] = ()  # Vocabulary.marked
    reserved: bool = False  # Vocabulary.reserved
    tokenizers: dict[str, str]  # fingerprint of each modality's, "text" the first one's
    tokens_per_item: dict[str, Count]  # of the modalities whose items are all equally long
    splits: dict[str, Split]
    tasks: tuple[Task, ...] = ()
    rejected: int = 0
    source: str = ""  # digest of the documents and settings that it was prepared from
    content: str = ""  # digest of all parts, if documents name files, which may change while the document files do not

    @model_validator(mode="before")
    @classmethod
    def _by_modality(cls, given: Any) -> Any:
        """Converts format 1, which has a field for each tokenizer."""
        if not isinstance(given, dict) or "tokenizers" in given or "text_tokenizer" not in given:
            return given
        old = dict(given)
        fingerprints = {name: old.pop(name, NO_TOKENIZER) for name in ("text_tokenizer", "image_tokenizer")}
        length = old.pop("tokens_per_image", 0)
        return old | {"tokenizers": by_modality(fingerprints), "tokens_per_item": {IMAGE: length} if length else {}}

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary of its ids."""
        return Vocabulary(self.modalities, self.ranges, self.marked, self.reserved)

    @property
    def text_tokenizer(self) -> str:
        """Fingerprint of the text tokenizer."""
        return self.tokenizers[TEXT]

    @property
    def image_tokenizer(self) -> str:
        """Fingerprint of the image tokenizer; "none" without images."""
        return self.tokenizers.get(IMAGE, NO_TOKENIZER)

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image; 0 without images."""
        return self.tokens_per_item.get(IMAGE, 0)

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


def read_manifest(folder: Path, *, like: Path | None = None, setting: str = "data.path") -> Manifest:
    """Read and check the manifest of a prepared data set.

    Args:
        folder: of the data set.
        like: a data set whose tokenizers this one must share, for the remedy; None: any tokenizers are right.
        setting: what names the folder, for the remedy.

    Raises:
        DataError: the folder, the manifest or a part is missing, damaged or truncated.
    """
    file = folder / MANIFEST
    own = () if like is None else ("--documents", "FILE", "--like", like, "--out", folder)
    prepare = f"run {shell_command('data', 'prepare', *own)}"
    if not folder.is_dir():
        raise DataError(f"data: {no_folder(folder)}", remedy=f"{prepare} or correct {setting}")
    if not file.is_file():
        raise DataError(f"data: {folder} is not a prepared data set (no {MANIFEST})", remedy=f"{prepare} to its end")
    try:
        manifest = Manifest.model_validate(bounded.read_json(file, most=MOST_BYTES))
    except (OSError, ValueError) as error:  # ValidationError is one
        raise DataError(f"data: {file} is damaged: {str(error).splitlines()[0]}", remedy=f"{prepare} again") from error
    if not 1 <= manifest.format <= FORMAT:
        raise DataError(
            f"data: {file} has format {manifest.format}, this version reads 1 to {FORMAT}", remedy=f"{prepare} again"
        )
    for split in manifest.splits.values():
        for part in split.parts:
            for suffix, size in ((".bin", part.bin_bytes), (".idx", part.idx_bytes)):
                path = folder / (part.prefix + suffix)
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                    raise DataError(f"data: {path} {state}", remedy=f"{prepare} again: only this part is made again")
    return manifest


def read_blend(config: Config) -> dict[Path, Manifest]:
    """Manifests of a configuration's data sets by folder, after checking that vocabulary and tokenizers agree.

    Raises:
        ConfigError: no data set is named.
        DataError: one is missing, damaged, or was prepared with another vocabulary or with other tokenizers than the
            others.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    folders = [Path(entry.path) for entry in named_sources(config)]
    first = next((folder for folder in folders if (folder / MANIFEST).is_file()), None)
    setting = "data.blend" if config.data.blend else "data.path"
    blend = {
        folder: read_manifest(folder, like=None if folder == first else first, setting=setting) for folder in folders
    }
    for folder, manifest in blend.items():
        check_vocabulary(folder, manifest, vocabulary)
    common_tokenizers({folder: manifest.tokenizers for folder, manifest in blend.items()}, like=most_complete(blend))
    return blend


def most_complete(blend: Mapping[Path, Manifest]) -> Path | None:
    """The first of the data sets with the most tokenizers, as a model for preparing others."""
    return max(blend, key=lambda folder: len(blend[folder].tokenizers), default=None)


def has_documents(blend: Mapping[Path, Manifest], split: str) -> bool:
    """Whether any data set has documents in this split."""
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
    """Write the manifest atomically."""
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1))


def check_vocabulary(folder: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
    """Refuse data whose ids have another meaning than the configuration's.

    Raises:
        DataError: the vocabularies differ.
    """
    if manifest.vocabulary != vocabulary.fingerprint:
        has = ", ".join(f"{n} {a}..{b - 1}" for n, (a, b) in zip(manifest.modalities, manifest.ranges, strict=True))
        wants = ", ".join(f"{n} {a}..{b - 1}" for n, (a, b) in zip(vocabulary.names, vocabulary.ranges, strict=True))
        other = replace(vocabulary, reserved=not vocabulary.reserved)
        if manifest.vocabulary == other.fingerprint:  # the ranges are the same
            words = {True: "true", False: "false"}
            has, wants = (f"vocab.reserved {words[one.reserved]}" for one in (other, vocabulary))
        raise DataError(
            f"data: {folder} was prepared with another vocabulary ({has}) than the configuration's ({wants})",
            remedy="prepare it with this configuration or correct "
            + ("vocab.reserved" if manifest.vocabulary == other.fingerprint else "vocab.modalities"),
        )


def by_modality(fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints by modality, without those of missing tokenizers.

    Args:
        fingerprints: as in a manifest, a checkpoint or an export; older ones use the key `text_tokenizer`.
    """
    return {name.removesuffix("_tokenizer"): value for name, value in fingerprints.items() if value != NO_TOKENIZER}


def check_tokenizers(
    folder: Path, found: Mapping[str, str], wanted: Mapping[str, str], *, where: str, like: Path | None = None
) -> None:
    """Refuse data whose ids were made by other tokenizers than a model's, even if the vocabularies agree.

    Args:
        folder: the data set.
        found: its `Manifest.tokenizers`.
        wanted: fingerprints likewise; modalities that only one side has are not compared.
        where: owner of `wanted`, for the message.
        like: a data set with the wanted tokenizers, for the remedy.

    Raises:
        DataError: one differs.
    """
    known = by_modality(wanted)
    for name, fingerprint in by_modality(found).items():
        if known.get(name, fingerprint) != fingerprint:
            raise DataError(
                f"data: the {name} tokenizer of {folder} ({fingerprint}) is another than that of {where} "
                f"({known[name]})",
                remedy="name a data set that was prepared with the tokenizers of training"
                if like is None
                else f"prepare {folder} again: add `--like {shlex.quote(str(like))} --overwrite` to its "
                "`mmscale data prepare` command",
            )


def common_tokenizers(blend: Mapping[Path, Mapping[str, str]], *, like: Path | None = None) -> dict[str, str]:
    """Fingerprints of the tokenizers of a blend by modality. Data sets need not have all modalities.

    Args:
        blend: folders and their `Manifest.tokenizers`.
        like: as in `check_tokenizers`.

    Raises:
        DataError: two data sets were made by different tokenizers.
    """
    found: dict[str, str] = {}
    for folder, own in blend.items():
        check_tokenizers(folder, own, found, where="the blend's data before it", like=like if like != folder else None)
        found |= by_modality(own)
    return found


def read_table(folder: Path, part: Part) -> np.ndarray:
    """Per-document table of a part, int64 [documents, modalities + 1].

    Raises:
        DataError: the table is missing or does not fit the part.
    """
    return np.array(map_table(folder, part))


def map_table(folder: Path, part: Part) -> np.ndarray:
    """The table of a part as from `read_table`, mapped instead of read.

    Raises:
        DataError: the table is missing or does not fit the part.
    """
    file = folder / f"{part.prefix}.meta.npy"
    try:
        table = read_array(file, mapped=True)
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
    refuse_damaged(table, folder, part, modalities)
    return table


def refuse_damaged(table: np.ndarray, folder: Path, part: Part, modalities: tuple[str, ...]) -> None:
    """Refuse rows of a part's table that no document can have.

    Raises:
        DataError: there is one.
    """
    if (table[:, :-1] < 0).any() or (table[:, FIRST_MODALITY] < 1).any():
        raise DataError(
            f"data: {folder / part.prefix}.meta.npy has a document without a {modalities[0]} token; "
            "a document starts with one",
            remedy=_AGAIN,
        )
