"""Settings of data preparation and of training data (`data`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmscale.config.section import Byte, Count, Index, Name, OneOf, Positive, Rate, Section, Seed, Share, setting
from mmscale.tables.settings import DATA_ORDERS, IMAGE_FITS, IMAGE_TOKENIZERS, READERS, TEXT_TOKENIZERS

MOST_NEIGHBOURS = 8  # of one document
# Two values of data.prepare.source that older versions prepared, and the settings that only they read, with defaults.
FORMER_SOURCES = ("digits", "emoji")
FORMER_PREPARE: dict[str, Any] = {
    "augment": 0,
    "emoji": {
        "font": "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        "annotations": "/usr/share/unicode/cldr/common",
        "languages": ["en"],
        "skin_tones": True,
        "limit": 0,
    },
}


class TextTokenizerConfig(Section):
    """Text to ids."""

    kind: Annotated[str, OneOf(TEXT_TOKENIZERS, plugin="text_tokenizer")] = setting(
        f"Tokenizer that is trained on the documents. {TEXT_TOKENIZERS.help} "
        "A plug-in: docs/extending/text_tokenizer.md.",
        "bpe",
    )
    kind_args: dict[Name, Any] = setting("Keyword arguments of a text tokenizer that is a plug-in.", {})
    load: str | None = setting(
        "Path of an existing tokenizer.json, of a .tiktoken file (texts are split as for cl100k_base), or of a .model "
        "file of sentencepiece (BPE or Unigram; extra `sentencepiece`); null: train a tokenizer on the documents.",
        None,
    )


class ImageTokenizerConfig(Section):
    """Pixels to discrete codes and back."""

    kind: Annotated[str, OneOf(IMAGE_TOKENIZERS, plugin="image_tokenizer")] = setting(
        f"Tokenizer of images. {IMAGE_TOKENIZERS.help} hf:FOLDER is short for vq with that path. "
        "A plug-in: docs/extending/image_tokenizer.md.",
        "kmeans",
    )
    kind_args: dict[Name, Any] = setting("Keyword arguments of an image tokenizer that is a plug-in.", {})
    size: Count = setting("Images are resized to size x size pixels.", 64, unit="pixels")
    channels: Literal[1, 3] = setting("1: grey, 3: RGB.", 3)
    fit: Annotated[str, OneOf(IMAGE_FITS)] = setting(
        f"How pictures that are not square become squares. {IMAGE_FITS.help}", "crop"
    )
    background: tuple[Byte, Byte, Byte] = setting(
        "Colour of padding and of transparent pixels: red, green, blue.", (255, 255, 255), unit="0 to 255"
    )
    damaged: Literal["reject", "salvage"] = setting(
        "Treatment of damaged pictures, for instance of files that are cut off. reject: the document is listed in "
        "rejected.jsonl; salvage: the readable part of the picture is used.",
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
        "vq: local folder of the VQ model, or of a Janus or Emu3 model that contains one. kmeans: folder of a fitted "
        "codebook to reuse.",
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


class CanariesConfig(Section):
    """Training documents of random characters, to measure memorisation (`data.prepare.canaries`)."""

    copies: tuple[Count, ...] = setting("Numbers of copies that are planted.", (1, 4, 16), unit="documents")
    count: Count = setting("Different canaries for each number of copies.", 8, unit="canaries")
    characters: Count = setting("Length of a canary.", 48, unit="characters")
    seed: Seed = setting("Seed of the characters.", 0)


class PrepareConfig(Section):
    """How documents become token ids (`mmscale data prepare`)."""

    source: Literal["documents", "megatron", "digits", "emoji"] = setting(
        "documents: files named below; megatron: .idx files of Megatron corpora, named below, whose .bin files are "
        "linked and not copied. digits and emoji are in the settings of older runs and data sets, which can be used "
        "as before; `mmscale data prepare` names the program that writes their documents now.",
        "documents",
    )
    documents: tuple[str, ...] = setting(
        "JSONL (.gz, .zst), parquet, Arrow or WebDataset (.tar) files, folders of Hugging Face datasets, or URLs of "
        "files on object stores. Paths are relative to the working directory; globs are allowed.",
        (),
    )
    reader: Annotated[str, OneOf(READERS, plugin="reader")] = setting(
        f"Reader of the files. {READERS.help} A plug-in: docs/extending/reader.md.", "suffix"
    )
    reader_args: dict[Name, Any] = setting("Keyword arguments of a reader that is a plug-in.", {})
    ignore: tuple[str, ...] = setting(
        "Keys (columns) of documents, or of their pieces, that are not read. Another unknown key rejects its document.",
        (),
    )
    id_offset: Index | None = setting(
        "megatron: offset that is added to every id of the corpora; default: the offset by which the ids of "
        "data.prepare.text.load are shifted to make room for the special tokens.",
        None,
        unit="ids",
    )
    columns: tuple[str, ...] = setting(
        "Tables (parquet, Arrow) whose columns are not document keys: the columns that make up a document, in order, "
        "e.g. [image, text]. They contain texts, files as {bytes, path}, or lists of both; lists of equal length are "
        "interleaved. Of other columns only `id`, `group`, `split` and `loss` are read. Empty: columns have the names "
        "of document keys.",
        (),
    )
    captions: tuple[str, ...] = setting(
        "WebDataset: suffixes of caption files (the part after the first dot, in lower case). In a .json the caption "
        "is the key `caption` or `text`.",
        ("txt", "text", "caption", "caption.txt"),
    )
    half_pairs: Literal["reject", "keep"] = setting(
        "WebDataset: treatment of samples that lack their caption or their picture in an archive that has pairs. "
        "reject: the sample is listed in rejected.jsonl, and an archive with more than a tenth of such samples is "
        "refused; keep: the sample becomes a document of the part that exists.",
        "reject",
    )
    text: TextTokenizerConfig = setting("Text tokenizer.", TextTokenizerConfig())
    image: ImageTokenizerConfig = setting("Image tokenizer.", ImageTokenizerConfig())
    modalities: dict[Name, dict[Name, int | float | str]] = setting(
        "Tokenizer settings of other modalities, by modality: the settings of its file in mmscale/data/modalities, and "
        "`load`, the folder of a fitted tokenizer to use.",
        {},
    )
    tasks: dict[Name, str] = setting(
        "Files of questions, by name of the task. A question is a document with choices and the index of the right "
        "one, or with an answer that the model must write exactly (JSONL). `mmscale eval` asks them.",
        {},
    )
    canaries: CanariesConfig | None = setting(
        "Plant training documents of random characters in known numbers of copies. `mmscale eval --task memorisation` "
        "measures how many of their tokens a model knows. null: none.",
        None,
    )
    held_out: Share = setting(
        "Share of the documents that is held out for validation, chosen by a hash of the `group`, or of the `id` if "
        "there is no group. Documents with a `split` keep it.",
        0.01,
    )
    max_document_tokens: Count = setting("Longer documents are rejected; an image is never cut.", 4096, unit="tokens")
    part_documents: Count = setting(
        "Documents per part: the unit of parallel work and of resuming.", 10_000, unit="documents"
    )
    workers: Count = setting("Number of processes.", 2, unit="processes")
    strict: bool = setting("Stop at the first bad document instead of listing it in rejected.jsonl.", False)

    @model_validator(mode="before")
    @classmethod
    def _without_former(cls, given: Any) -> Any:
        """Drops settings of older versions that have no effect; what they would change now is refused as unknown."""
        if not isinstance(given, dict):
            return given
        all_of_them = given.get("source") in FORMER_SOURCES
        return {
            key: value
            for key, value in given.items()
            if key not in FORMER_PREPARE or not (all_of_them or value == FORMER_PREPARE[key])
        }


class DataSource(Section):
    """One prepared data set of a blend."""

    path: str = setting("Folder written by `mmscale data prepare`.")
    weight: Rate | dict[Index, Rate] = setting(
        "Relative number of sequences that training draws from this source. A source with weight 0 is only evaluated. "
        "For a weight that changes, give the weight from each step on, e.g. {0: 0.7, 100000: 0.3}; a step is "
        "train.global_batch_size sequences.",
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


class RetrievalConfig(Section):
    """Neighbours that documents are read with: each is a document of the same data set, placed before it."""

    neighbours: Annotated[Index, Field(le=MOST_NEIGHBOURS)] = setting(
        "Largest number of neighbours of a training document, from the tables of `mmscale data retrieve`. Each epoch "
        "draws for each document a number from 0 to this and which of its neighbours these are. They share the "
        "document's attention and its sequence; those that would not fit are left out. 0: off.",
        0,
        unit="documents",
    )
    loss: bool = setting("Whether the tokens of neighbours are trained on, as those of other documents are.", True)
    evaluation: Annotated[Index, Field(le=MOST_NEIGHBOURS)] | Literal["random"] = setting(
        "Neighbours that a held-out document is evaluated with: the number of nearest training documents, or random: "
        "as many random training documents as `neighbours`, but at least one. Their tokens are not part of held-out "
        "losses.",
        0,
        unit="documents",
    )


class DataConfig(Section):
    """Data sets, their order, and packing."""

    path: str | None = setting("Folder of a prepared data set.", None)
    blend: tuple[DataSource, ...] = setting("Several prepared data sets with weights, instead of path.", ())
    temperature: Positive = setting(
        "Shares of a blend's sources are proportional to weight ** (1 / temperature). With tokens as weights, a "
        "temperature of 1 reads all sources equally often, and a high temperature gives them nearly equal shares.",
        1.0,
    )
    validation: dict[Name, str] = setting(
        "Data sets to evaluate on, by name, in addition to the held-out documents of the training data: folders "
        "written by `mmscale data prepare` with the same vocabulary and tokenizers. Their held-out documents are "
        "read, or all documents if none are held out.",
        {},
    )
    order: Annotated[str, OneOf(DATA_ORDERS)] = setting(
        f"Order of the documents of a new run. {DATA_ORDERS.help} A run keeps the order it started with.", "blocks"
    )
    selection: Literal["apply", "ignore"] = setting(
        "Use of the weights that `mmscale data dedup` and `mmscale data select` have written next to a data set. "
        "apply: training leaves out and repeats documents by their weights; ignore: each document is read once per "
        "epoch.",
        "apply",
    )
    retrieval: RetrievalConfig = setting("Documents that are read together with their neighbours.", RetrievalConfig())
    balance: bool = setting("Deal packed sequences into micro-batches of nearly equal modality shares.", True)
    pack_window: Count = setting("Number of documents among which best-fit packing chooses.", 8192, unit="documents")
    deal_window: Count = setting(
        "Number of packed sequences that are dealt into micro-batches together.", 2048, unit="sequences"
    )
    document_multiple: Count = setting(
        "Each document is padded in its sequence to a multiple of this number. parallel.cp needs a multiple of 2 * cp "
        "(16 works for cp up to 8). It is a data setting, so that packing and loss do not depend on the layout.",
        1,
        unit="tokens",
    )
    cache: str | None = setting(
        "Folder of packing indices and of the counts of blocks; default: .cache inside the data set.", None
    )
    verify: Literal["once", "node", "off"] = setting(
        "Whether a run reads the prepared files in the background at its start and compares their digests. once: each "
        "file is read by one node; node: every node reads all files, for data that each node has its own copy of; off: "
        "no check.",
        "once",
    )
    workers: Index = setting("Loader processes per rank; 0 loads in the training process.", 0, unit="processes")
    seed: Seed | None = setting(
        "Seed of the order of documents; default: run.seed. Runs with the same data.seed and different run.seed differ "
        "only in weights and dropout.",
        None,
    )
    prepare: PrepareConfig | None = setting("Preparation of the data set; only `mmscale data prepare` needs it.", None)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The blend; a single `path` is a blend of one source."""
        return (DataSource(path=self.path),) if self.path is not None else self.blend
