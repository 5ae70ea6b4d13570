"""Settings of data: how documents become tokens, and what is trained on (`data`).

Rules between them are in rules_data.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from mmscale.config.section import Count, Index, Name, Rate, Section, Share, setting


class TextTokenizerConfig(Section):
    """Byte-level BPE through Hugging Face `tokenizers`."""

    load: str | None = setting("Path of a tokenizer.json to use; null: train one on the documents.", None)


class ImageTokenizerConfig(Section):
    """Pixels to discrete codes and back."""

    kind: Literal["levels", "kmeans", "vq"] = setting(
        "levels: each pixel's grey level; kmeans: a codebook of patches fitted to the data; vq: a transformers VQ-VAE. "
        "hf:FOLDER is short for vq with that path.",
        "kmeans",
    )
    size: Count = setting("Images are brought to size x size pixels.", 64, unit="pixels")
    channels: Literal[1, 3] = setting("1: grey, 3: RGB.", 3)
    patch: Count = setting("Edge of a k-means patch.", 8, unit="pixels")
    residual: Index = setting(
        "kmeans: how many of the image modality's ids are a second codebook, for what the first one leaves of a patch; "
        "a patch has two tokens then. 0: one codebook.",
        0,
        unit="codes",
    )
    path: str | None = setting(
        "Local folder of the VQ model, or of a Janus or Emu3 model that has one (vq); or of a fitted codebook to reuse "
        "(kmeans).",
        None,
    )
    fit_patches: Count = setting(
        "Patches that k-means is fitted to, at most. One image is read for every 8 of them; a codebook has at most one "
        "code for 40 patches of these images.",
        200_000,
        unit="patches",
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        kind = given.get("kind") if isinstance(given, dict) else None
        if not isinstance(kind, str) or not kind.startswith("hf:") or given.get("path") is not None:
            return given  # two folders: kind is refused
        return given | {"kind": "vq", "path": kind.removeprefix("hf:")}


class EmojiConfig(Section):
    """Where the emoji's pictures and names come from (`data.prepare.source: emoji`)."""

    font: str = setting(
        "Colour font that the pictures are drawn with; Debian: fonts-noto-color-emoji.",
        "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    )
    annotations: str = setting(
        "Folder with annotations/ and annotationsDerived/ of the Unicode CLDR; Debian: unicode-cldr-core.",
        "/usr/share/unicode/cldr/common",
    )
    languages: tuple[str, ...] = setting("Languages of the names: file names of the CLDR.", ("en",))
    skin_tones: bool = setting("Whether variants of one emoji in five skin tones are taken.", True)
    limit: Index = setting("Emoji taken at most, chosen by a hash; 0: all.", 0, unit="emoji")


class PrepareConfig(Section):
    """How documents become token ids (`mmscale data prepare`)."""

    source: Literal["digits", "emoji", "documents"] = setting(
        "digits: the built-in set of scikit-learn's handwritten digits; emoji: pictures of a font and their names in "
        "the Unicode CLDR; documents: files named below.",
        "documents",
    )
    documents: tuple[str, ...] = setting("JSONL, parquet or WebDataset (.tar) files; globs allowed.", ())
    ignore: tuple[str, ...] = setting(
        "Keys (columns) of documents that are not read. Any other unknown key rejects its document.", ()
    )
    text: TextTokenizerConfig = setting("Text tokenizer.", TextTokenizerConfig())
    image: ImageTokenizerConfig = setting("Image tokenizer.", ImageTokenizerConfig())
    emoji: EmojiConfig = setting("Settings of the source emoji.", EmojiConfig())
    held_out: Share = setting(
        "Share kept for validation: of documents, by a hash of their `group`, else of their `id`, unless they have a "
        "`split`; of base emoji, by a hash of them.",
        0.01,
    )
    augment: Index = setting(
        "digits: shifted copies of each training image (0..8), one pixel in each direction.", 0, unit="copies"
    )
    max_document_tokens: Count = setting("Longer documents are rejected; an image is never cut.", 4096, unit="tokens")
    part_documents: Count = setting(
        "Documents of one part: the unit of parallel work and of resuming.", 10_000, unit="documents"
    )
    workers: Count = setting("Processes.", 2, unit="processes")
    strict: bool = setting("Stop at the first bad document instead of listing it in rejected.jsonl.", False)


class DataSource(Section):
    """One prepared data set of a blend."""

    path: str = setting("Folder written by `mmscale data prepare`.")
    weight: Rate = setting(
        "Relative number of sequences drawn from it in training; 0: none. It is evaluated all the same.", 1.0
    )


class DataConfig(Section):
    """What is trained on, and in which order."""

    path: str | None = setting("Folder of a prepared data set.", None)
    blend: tuple[DataSource, ...] = setting("Several prepared data sets with weights, instead of path.", ())
    validation: dict[Name, str] = setting(
        "Data sets to evaluate on, by name, besides the held-out documents of those trained on: folders written by "
        "`mmscale data prepare`, with the same vocabulary and tokenizers. Of each the held-out documents are read, or "
        "all where none are held out.",
        {},
    )
    balance: bool = setting("Deal packed sequences into micro-batches of nearly equal modality shares.", True)
    pack_window: Count = setting("Documents among which best-fit packing chooses.", 8192, unit="documents")
    deal_window: Count = setting("Packed sequences that are dealt into micro-batches together.", 2048, unit="sequences")
    cache: str | None = setting("Folder of packing indices; default: .cache inside the data set.", None)
    workers: Index = setting("Loader processes per rank; 0 loads in the training process.", 0, unit="processes")
    prepare: PrepareConfig | None = setting("How the data set is made; needed by `mmscale data prepare` only.", None)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The blend, whichever way it was given."""
        return (DataSource(path=self.path),) if self.path is not None else self.blend
