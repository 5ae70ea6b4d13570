"""One table for each choice of the configuration: its names, what they mean, and the facts that other modules need.

The schema takes the allowed values from here, `mmscale config explain` and the reference pages take the meanings. A new
choice is one entry here and one entry in the table of code that implements it; a test compares both.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.tables.table import Choice, Table


@dataclass(frozen=True, kw_only=True)
class ModelKind(Choice):
    """A kind of feed-forward layer (`model.kind`).

    Attributes:
        experts: whether feed-forward layers are groups of experts.
        per_modality: whether each modality has its own group.
        kernels: approximate number of GPU kernels that the forward pass of a layer starts.
    """

    experts: bool
    per_modality: bool = False
    kernels: int


KINDS: Table[ModelKind] = Table(
    "Feed-forward layers",
    ("model.kind",),
    {
        "dense": ModelKind(meaning="one SwiGLU for all tokens", experts=False, kernels=30),
        "moe": ModelKind(meaning="one group of experts for the tokens of all modalities", experts=True, kernels=60),
        "moma": ModelKind(meaning="a group of experts per modality", experts=True, per_modality=True, kernels=75),
    },
)


@dataclass(frozen=True, kw_only=True)
class NormPlacement(Choice):
    """Where RMSNorm is applied in a layer (`model.norm`).

    Attributes:
        before: whether sub-layers normalise their input; otherwise their output.
        per_expert: whether every expert's output is normalised separately. The sub-layer's output is not, then.
    """

    before: bool = False
    per_expert: bool = False


NORMS: Table[NormPlacement] = Table(
    "Norm placements",
    ("model.norm",),
    {
        "pre": NormPlacement(meaning="before each sub-layer", before=True),
        "post": NormPlacement(meaning="after each sub-layer (Chameleon/Swin, the paper's)"),
        "post_per_expert": NormPlacement(
            meaning="after each sub-layer, and every expert's output is normalised before its gate, which keeps the "
            "gate's gradient for every token",
            per_expert=True,
        ),
    },
)


UNTIED: Table[Choice] = Table(
    "Untied parts of a model",
    ("model.untie",),
    {
        "attention": Choice(meaning="the projections of attention, which still runs over all tokens"),
        "ffn": Choice(meaning="the feed-forward layer of a dense model"),
        "norms": Choice(meaning="the norms of a layer, also those of queries and keys"),
        "final_norm": Choice(meaning="the norm before the output layer"),
    },
)


FROZEN: Table[Choice] = Table(
    "Parts of a modality's weights that can be frozen (optim.freeze: MODALITY.PART)",
    (),
    {
        "attention": Choice(meaning="its untied projections of attention"),
        "ffn": Choice(meaning="its untied feed-forward layers"),
        "norms": Choice(meaning="its untied norms of layers"),
        "final_norm": Choice(meaning="its untied norm before the output layer"),
        "experts": Choice(meaning="its experts, with their router"),
    },
)


RANKINGS: Table[Choice] = Table(
    "Expert rankings",
    ("model.experts.choice",),
    {
        "sigmoid": Choice(meaning="the expert's own logit (the paper's)"),
        "competitive": Choice(
            meaning="the logit minus the mean over the group's experts, so that they prefer different tokens"
        ),
        "softmax": Choice(meaning="the softmax over the group's experts"),
    },
)


SCORES: Table[Choice] = Table(
    "Scores of token choice",
    ("model.experts.token_choice.scores",),
    {
        "sigmoid": Choice(meaning="the sigmoid of each expert's logit (DeepSeek-V3)"),
        "softmax": Choice(meaning="the softmax over the experts of its group (Switch, Mixtral)"),
    },
)


LOSS_WEIGHTS: Table[Choice] = Table(
    "Loss-based weights",
    ("train.loss_weights.kind",),
    {
        "linupper": Choice(meaning="documents of a low loss weigh less (min(h + 1, 1))"),
        "quadratic": Choice(meaning="documents of a low or a high loss weigh less (1 - h^2)"),
        "extremes": Choice(meaning="documents of a medium loss weigh less (abs(h))"),
    },
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Choice):
    """A rule that stretches rotary position embeddings (`model.rope_scaling.rope_type`), by transformers' name.

    Attributes:
        reads: settings beside `factor` that it depends on, by transformers' names.
    """

    reads: tuple[str, ...] = ()


ROPE_SCALINGS: Table[RopeScaling] = Table(
    "Stretched rotary position embeddings",
    ("model.rope_scaling.rope_type",),
    {
        "llama3": RopeScaling(
            meaning="slow angles are divided by the factor, fast ones stay (Llama 3.1)",
            reads=("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        ),
        "linear": RopeScaling(meaning="every angle is divided by the factor (position interpolation)"),
        "yarn": RopeScaling(
            meaning="slow angles are divided by the factor, fast ones stay, and queries and keys are lengthened (YaRN)",
            reads=("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        ),
    },
)


@dataclass(frozen=True, kw_only=True)
class Schedule(Choice):
    """A learning-rate schedule after the warm-up (`optim.schedule`).

    Attributes:
        reads: settings that it depends on besides `lr` and `warmup` and that not every schedule depends on.
        comparable: whether losses before its end can be compared between runs of different length, because the learning
            rate does not depend on the number of steps until then.
    """

    reads: tuple[str, ...] = ()
    comparable: bool = False

    @property
    def final_decay(self) -> bool:
        """Whether it decays over the last `optim.decay` steps only."""
        return "decay" in self.reads


SCHEDULES: Table[Schedule] = Table(
    "Learning-rate schedules",
    ("optim.schedule", "auxiliary.optim.schedule", "sft.optim.schedule"),
    {
        "constant": Schedule(meaning="the peak until the end", comparable=True),
        "linear": Schedule(meaning="a straight line from the peak to min_lr", reads=("min_lr",)),
        "cosine": Schedule(meaning="half a cosine from the peak to min_lr", reads=("min_lr",)),
        "wsd": Schedule(
            meaning="the peak, then a straight line to min_lr over the last `decay` steps",
            reads=("decay", "min_lr"),
            comparable=True,
        ),
        "inverse_sqrt": Schedule(meaning="the peak times sqrt(warmup / step), at least min_lr", reads=("min_lr",)),
        "power": Schedule(
            meaning="lr * (tokens / power_tokens)^power_exponent, capped at lr, then as wsd",
            reads=("decay", "min_lr", "power_exponent", "power_tokens"),
            comparable=True,
        ),
    },
)


@dataclass(frozen=True, kw_only=True)
class OptimizerKind(Choice):
    """An optimizer (`optim.optimizer`).

    Attributes:
        orthogonal: whether it orthogonalises the momentum of hidden layers' matrices, which have no second moment.
    """

    orthogonal: bool = False


OPTIMIZERS: Table[OptimizerKind] = Table(
    "Optimizers",
    ("optim.optimizer", "auxiliary.optim.optimizer", "sft.optim.optimizer"),
    {
        "adamw": OptimizerKind(meaning="AdamW, with decoupled weight decay"),
        "muon": OptimizerKind(
            meaning="Muon for matrices of attention, feed-forward layers and experts, AdamW for everything else, with "
            "one learning rate",
            orthogonal=True,
        ),
    },
)


LOSSES: Table[Choice] = Table(
    "Losses",
    ("train.loss",),
    {"cross_entropy": Choice(meaning="cross entropy weighted by train.modality_weights, plus z-loss")},
)


@dataclass(frozen=True, kw_only=True)
class MomentFormat(Choice):
    """How Adam's moments of matrices are stored (`optim.moments`).

    Attributes:
        bytes: of both moments of a parameter [bytes].
        bf16: whether moments have bf16's 8 bits, which are too coarse for a slow decay.
        compact: whether mmscale's own Adam stores them (train: adam_compact.py).
        in_groups: whether neighbouring elements share a scale, so that ranks' shards must begin at a group.
        te_dtype: torch dtype in which Transformer-Engine's FusedAdam stores them; None: it does not support them.
    """

    bytes: float
    bf16: bool = False
    compact: bool = False
    in_groups: bool = False
    te_dtype: str | None = None


MOMENTS: Table[MomentFormat] = Table(
    "Formats of Adam's moments",
    ("optim.moments", "auxiliary.optim.moments", "sft.optim.moments"),
    {
        "fp32": MomentFormat(meaning="8 bytes per parameter", bytes=8.0),
        "bf16": MomentFormat(meaning="4 bytes per parameter", bytes=4.0, bf16=True, compact=True),
        "fp8_coat": MomentFormat(
            meaning="E4M3 with dynamic range expansion in groups of 128, 2.19 bytes per parameter",
            bytes=2.19,
            compact=True,
            in_groups=True,
        ),
        "te_bf16": MomentFormat(
            meaning="4 bytes per parameter, by Transformer-Engine's FusedAdam, GPU only",
            bytes=4.0,
            bf16=True,
            te_dtype="bfloat16",
        ),
        "te_fp8": MomentFormat(
            meaning="2 bytes per parameter, by Transformer-Engine's FusedAdam, GPU only", bytes=2.0, te_dtype="uint8"
        ),
    },
)


TEXT_TOKENIZERS: Table[Choice] = Table(
    "Text tokenizers",
    ("data.prepare.text.kind",),
    {
        "bpe": Choice(meaning="byte-level BPE through Hugging Face tokenizers, trained or loaded"),
        "bytes": Choice(meaning="each byte of UTF-8 is a token, in 256 ids after the special tokens"),
    },
)


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerKind(Choice):
    """A kind of image tokenizer (`data.prepare.image.kind`).

    Attributes:
        reads: settings of `data.prepare.image` that it depends on and that not every kind does.
    """

    reads: tuple[str, ...] = ()


IMAGE_TOKENIZERS: Table[ImageTokenizerKind] = Table(
    "Image tokenizers",
    ("data.prepare.image.kind",),
    {
        "levels": ImageTokenizerKind(meaning="each pixel's grey level"),
        "kmeans": ImageTokenizerKind(
            meaning="a codebook of patches fitted to the data", reads=("patch", "residual", "fit_patches", "path")
        ),
        "vq": ImageTokenizerKind(meaning="a transformers VQ-VAE", reads=("path",)),
    },
)


@dataclass(frozen=True, kw_only=True)
class DataOrder(Choice):
    """The order of the documents of a source (`data.order`). Runs store the name, so these values must never change.

    Attributes:
        block: approximate number of documents that are shuffled and packed together; 0: those of a whole pass.
        chunk: consecutive documents of the data set that are always in one block.
        above: sources with more documents than this are read in blocks [documents].
    """

    block: int = 0
    chunk: int = 1
    above: int = 0


DATA_ORDERS: Table[DataOrder] = Table(
    "Data orders",
    ("data.order",),
    {
        "epochs": DataOrder(meaning="all documents of a pass are shuffled and packed together"),
        "blocks": DataOrder(
            meaning="a source with more than 1,048,576 documents is shuffled and packed in blocks of about 262,144, so "
            "that time and memory do not grow with the number of documents, and smaller sources as with epochs",
            block=1 << 18,
            chunk=64,
            above=1 << 20,
        ),
    },
)


IMAGE_SPANS: Table[Choice] = Table(
    "Spans of causal masking inside images",
    ("objective.image_spans",),
    {
        "whole": Choice(meaning="an image as a whole is one span, or in none"),
        "none": Choice(meaning="only text is masked"),
        "partial": Choice(meaning="parts of an image are masked too, in the order of its tokens"),
    },
)


READERS: Table[Choice] = Table(
    "Readers of document files",
    ("data.prepare.reader",),
    {"suffix": Choice(meaning="JSONL, parquet or WebDataset tar, by the suffix of each file")},
)


@dataclass(frozen=True, kw_only=True)
class ImageFit(Choice):
    """How an image that is not square becomes square (`data.prepare.image.fit`).

    Attributes:
        verb: what is done, in one word.
        done: effect on the image, with `{share}`: on average, 1 minus the short side by the long one [percent].
    """

    verb: str
    done: str


IMAGE_FITS: Table[ImageFit] = Table(
    "Fits of pictures that are not square",
    ("data.prepare.image.fit",),
    {
        "crop": ImageFit(
            meaning="the centre square, without the ends of the long side",
            verb="cropped",
            done="cropped to the centre, which cuts off {share} of their area on average",
        ),
        "pad": ImageFit(
            meaning="the whole picture, between bars of the background colour",
            verb="padded",
            done="padded to a square, of which {share} is background on average",
        ),
        "stretch": ImageFit(
            meaning="the whole picture, its long side shortened to the short one",
            verb="stretched",
            done="stretched to a square, their long sides shortened by {share} on average",
        ),
    },
)
