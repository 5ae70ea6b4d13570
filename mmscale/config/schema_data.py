"""Settings of data preparation and of training data (`data`).

Rules between them are in rules_data.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from mmscale.config.section import Byte, Count, Index, Name, OneOf, Positive, Rate, Section, Seed, Share, setting
from mmscale.tables.settings import DATA_ORDERS, IMAGE_FITS, IMAGE_TOKENIZERS, READERS, TEXT_TOKENIZERS


class TextTokenizerConfig(Section):
    """Text to ids."""

    kind: Annotated[str, OneOf(TEXT_TOKENIZERS, plugin="text_tokenizer")] = setting(
        f"What is trained on the documents. {TEXT_TOKENIZERS.help} A plug-in: docs/extending/text_tokenizer.md.", "bpe"
    )
    kind_args: dict[Name, Any] = setting("Keyword arguments of a text tokenizer that is a plug-in.", {})
    load: str | None = setting(
        "Path of a tokenizer.json to use, or of a .tiktoken file whose texts are cut as those of cl100k_base; null: "
        "train one on the documents.",
        None,
    )


class ImageTokenizerConfig(Section):
    """Pixels to discrete codes and back."""

    kind: Annotated[str, OneOf(IMAGE_TOKENIZERS, plugin="image_tokenizer")] = setting(
        f"Pixels to codes. {IMAGE_TOKENIZERS.help} hf:FOLDER is short for vq with that path. "
        "A plug-in: docs/extending/image_tokenizer.md.",
        "kmeans",
    )
    kind_args: dict[Name, Any] = setting("Keyword arguments of an image tokenizer that is a plug-in.", {})
    size: Count = setting("Images are resized to size x size pixels.", 64, unit="pixels")
    channels: Literal[1, 3] = setting("1: grey, 3: RGB.", 3)
    fit: Annotated[str, OneOf(IMAGE_FITS)] = setting(
        f"What is done to pictures that are not square. {IMAGE_FITS.help}", "crop"
    )
    background: tuple[Byte, Byte, Byte] = setting(
        "Colour under transparent pixels and of padding: red, green, blue.", (255, 255, 255), unit="0 to 255"
    )
    damaged: Literal["reject", "salvage"] = setting(
        "What becomes of a damaged picture, for instance one that is cut off. reject: its document is listed in "
        "rejected.jsonl; salvage: the picture shows what can be read of it.",
        "reject",
    )
    patch: Count = setting("Edge of a k-means patch.", 8, unit="pixels")
    residual: Index = setting(
        "kmeans: number of the image modality's ids that form a second codebook, for the residual of a patch after "
        "the first; each patch then has two tokens. 0: one codebook.",
        0,
        unit="codes",
    )
    path: str | None = setting(
        "Local folder of the VQ model, or of a Janus or Emu3 model that contains one (vq); or of a fitted codebook "
        "to reuse (kmeans).",
        None,
    )
    fit_patches: Count = setting(
        "Largest number of patches for fitting k-means. One image is read for every 8 of them; a codebook has at "
        "most one code for 40 patches of these images.",
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
    """Files with the pictures and names of emoji (`data.prepare.source: emoji`)."""

    font: str = setting(
        "Colour font that the pictures are drawn with; Debian: fonts-noto-color-emoji.",
        "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    )
    annotations: str = setting(
        "Folder with annotations/ and annotationsDerived/ of the Unicode CLDR; Debian: unicode-cldr-core.",
        "/usr/share/unicode/cldr/common",
    )
    languages: tuple[str, ...] = setting("Languages of the names: file names of the CLDR.", ("en",))
    skin_tones: bool = setting("Include the variants of an emoji in five skin tones.", True)
    limit: Index = setting("Largest number of emoji, chosen by a hash; 0: all.", 0, unit="emoji")


class PrepareConfig(Section):
    """How documents become token ids (`mmscale data prepare`)."""

    source: Literal["digits", "emoji", "documents", "megatron"] = setting(
        "digits: the built-in set of scikit-learn's handwritten digits; emoji: pictures of a font and their names in "
        "the Unicode CLDR; documents: files named below; megatron: .idx files of Megatron corpora, named below, whose "
        ".bin files are linked and not copied.",
        "documents",
    )
    documents: tuple[str, ...] = setting(
        "JSONL (.gz, .zst), parquet, Arrow or WebDataset (.tar) files, folders of Hugging Face datasets, or URLs of "
        "files on object stores, relative to where the command is run; globs allowed.",
        (),
    )
    reader: Annotated[str, OneOf(READERS, plugin="reader")] = setting(
        f"What reads the files. {READERS.help} A plug-in: docs/extending/reader.md.", "suffix"
    )
    reader_args: dict[Name, Any] = setting("Keyword arguments of a reader that is a plug-in.", {})
    ignore: tuple[str, ...] = setting(
        "Keys (columns) of documents that are not read. Any other unknown key rejects its document.", ()
    )
    id_offset: Index | None = setting(
        "megatron: added to every id of the corpora; default: by how much the ids of data.prepare.text.load are moved "
        "up, to make room for the special tokens.",
        None,
        unit="ids",
    )
    columns: tuple[str, ...] = setting(
        "Tables (parquet, Arrow) whose rows are not documents: the columns that make one up, in their order, e.g. "
        "[image, text]. They hold texts, files as {bytes, path}, or lists of both; parallel lists are interleaved. Of "
        "other columns only `id`, `group`, `split` and `loss` are read. Empty: columns are named as keys of documents.",
        (),
    )
    captions: tuple[str, ...] = setting(
        "WebDataset: what the names of captions have after their first dot, in lower case. Captions in a .json are its "
        "`caption` or `text`.",
        ("txt", "text", "caption", "caption.txt"),
    )
    half_pairs: Literal["reject", "keep"] = setting(
        "WebDataset: what becomes of a sample without its caption or its picture in an archive that has pairs. reject: "
        "it is listed in rejected.jsonl, and an archive with more than a tenth of them is refused; keep: it is a "
        "document of what there is.",
        "reject",
    )
    text: TextTokenizerConfig = setting("Text tokenizer.", TextTokenizerConfig())
    image: ImageTokenizerConfig = setting("Image tokenizer.", ImageTokenizerConfig())
    modalities: dict[Name, dict[Name, int | float | str]] = setting(
        "Settings of the tokenizers of other modalities by modality: those that its file in mmscale/data/modalities "
        "names, and `load`, the folder of a fitted tokenizer to use.",
        {},
    )
    emoji: EmojiConfig = setting("Settings of the source emoji.", EmojiConfig())
    tasks: dict[Name, str] = setting(
        "Files of questions by name (JSONL: documents with choices and the number of the right one, or with an answer "
        "that is to be written exactly). `mmscale eval` asks them.",
        {},
    )
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
        "Documents per part: the unit of parallel work and of resuming.", 10_000, unit="documents"
    )
    workers: Count = setting("Number of processes.", 2, unit="processes")
    strict: bool = setting("Stop at the first bad document instead of listing it in rejected.jsonl.", False)


class DataSource(Section):
    """One prepared data set of a blend."""

    path: str = setting("Folder written by `mmscale data prepare`.")
    weight: Rate | dict[Index, Rate] = setting(
        "Relative number of sequences drawn from it in training. A source with weight 0 is only evaluated. Weights "
        "that change: the weight from each step on, e.g. {0: 0.7, 100000: 0.3}; a step is train.global_batch_size "
        "sequences.",
        1.0,
    )
    max_epochs: Count | None = setting(
        "Passes over its documents after which it is not read any more in a run: its weight goes to the other sources. "
        "A run whose sources all end before train.steps is refused.",
        None,
        unit="passes",
    )

    def weight_at(self, step: int) -> float:
        """The weight of the batch that follows this many steps."""
        if not isinstance(self.weight, dict):
            return self.weight
        return self.weight[max(start for start in self.weight if start <= step)]

    @property
    def trained(self) -> bool:
        """Whether it has a weight at any step."""
        return any(self.weight.values()) if isinstance(self.weight, dict) else bool(self.weight)


class DataConfig(Section):
    """Data sets, their order, and packing."""

    path: str | None = setting("Folder of a prepared data set.", None)
    blend: tuple[DataSource, ...] = setting("Several prepared data sets with weights, instead of path.", ())
    temperature: Positive = setting(
        "Shares of a blend's sources are in proportion to weight ** (1 / temperature): with tokens as weights, 1 reads "
        "all sources equally often, and a large one gives them nearly equal shares.",
        1.0,
    )
    validation: dict[Name, str] = setting(
        "Data sets to evaluate on, by name, in addition to the held-out documents of the training data: folders "
        "written by `mmscale data prepare` with the same vocabulary and tokenizers. Their held-out documents are "
        "read, or all documents if none are held out.",
        {},
    )
    order: Annotated[str, OneOf(DATA_ORDERS)] = setting(
        f"Order of the documents of a new run. {DATA_ORDERS.help} A run keeps the order that it began with.", "blocks"
    )
    selection: Literal["apply", "ignore"] = setting(
        "Whether training leaves out and repeats documents as the weights say that `mmscale data dedup` and `mmscale "
        "data select` have written beside a data set. ignore: each document is read once per epoch.",
        "apply",
    )
    balance: bool = setting("Deal packed sequences into micro-batches of nearly equal modality shares.", True)
    pack_window: Count = setting("Number of documents among which best-fit packing chooses.", 8192, unit="documents")
    deal_window: Count = setting(
        "Number of packed sequences that are dealt into micro-batches together.", 2048, unit="sequences"
    )
    document_multiple: Count = setting(
        "Each document is padded to a multiple of this in its sequence. parallel.cp needs a multiple of 2 * cp; a "
        "data setting, so that packing and loss do not depend on the layout (16 serves cp up to 8).",
        1,
        unit="tokens",
    )
    cache: str | None = setting("Folder of packing indices; default: .cache inside the data set.", None)
    verify: Literal["once", "node", "off"] = setting(
        "Whether a run reads the prepared files in the background at its start and compares their digests. once: the "
        "nodes share the files; node: each node reads all of them, where each has a copy of its own.",
        "once",
    )
    workers: Index = setting("Loader processes per rank; 0 loads in the training process.", 0, unit="processes")
    seed: Seed | None = setting(
        "Seed of the order of documents; default: run.seed. Runs with the same one and different run.seed differ in "
        "weights and dropout only.",
        None,
    )
    prepare: PrepareConfig | None = setting("Preparation of the data set; needed by `mmscale data prepare` only.", None)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The blend; a single `path` is a blend of one source."""
        return (DataSource(path=self.path),) if self.path is not None else self.blend
