"""Every setting of mmscale: a name, a type, a unit, a default and a meaning.

Only shapes of single values live here. Rules between settings are in rules.py, reading and overriding in load.py.
Nothing here imports torch: the schema is read on login nodes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmscale.config.values import parse_integer, parse_number, parse_seconds

Count = Annotated[PositiveInt, BeforeValidator(parse_integer)]
Index = Annotated[NonNegativeInt, BeforeValidator(parse_integer)]
Rate = Annotated[NonNegativeFloat, BeforeValidator(parse_number)]
Positive = Annotated[PositiveFloat, BeforeValidator(parse_number)]
Seconds = Annotated[PositiveFloat, BeforeValidator(parse_seconds)]
Fraction = Annotated[float, BeforeValidator(parse_number), Field(gt=0.0, le=1.0)]
Share = Annotated[float, BeforeValidator(parse_number), Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def setting(meaning: str, default: Any = ..., *, unit: str = "", source: str = "") -> Any:
    """A documented field. Without `default` the setting must be given.

    Args:
        meaning: one sentence for `mmscale config explain`.
        default: the value used when the setting is left out.
        unit: what the number counts, e.g. "tokens".
        source: paper section or mcore file the setting comes from.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source})


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class RunConfig(Section):
    """Where a run lives."""

    dir: str = setting("Folder that holds run folders.", "runs")
    name: Name = setting("Name of the run; its folder is run.dir/run.name.", "default")
    seed: Index = setting("Seed of weights, data order and dropout.", 1234)


class ModalityVocab(Section):
    """One modality's share of the vocabulary."""

    name: Name = setting("Name of the modality, e.g. text or image.")
    size: Count = setting(
        "Number of token ids of this modality; the first modality includes the special tokens.", unit="ids"
    )


class VocabConfig(Section):
    """Token ids: one contiguous range per modality, in this order, then padding up to a multiple."""

    modalities: tuple[ModalityVocab, ...] = setting(
        "Modalities in id order; the first one is text and holds the special tokens.",
        (ModalityVocab(name="text", size=57_344), ModalityVocab(name="image", size=8_192)),
        source="Chameleon, arXiv 2405.09818: 65,536 ids of which 8,192 are image codes",
    )
    pad_multiple: Count = setting(
        "The embedding's row count is rounded up to this; TP must divide it.", 128, unit="ids"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modalities in id order."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def size(self) -> int:
        """Number of ids that can occur [ids]."""
        return sum(modality.size for modality in self.modalities)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and of the output layer [ids]."""
        return -(-self.size // self.pad_multiple) * self.pad_multiple

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open id range of each modality."""
        starts = [0]
        for modality in self.modalities:
            starts.append(starts[-1] + modality.size)
        return tuple(pairwise(starts))


class ExpertsConfig(Section):
    """Feed-forward experts (MoMa, arXiv 2407.21770, section 2.2)."""

    counts: dict[Name, Count] = setting(
        "Experts of each modality group, e.g. {text: 4, image: 4}; for kind=moe one group, {mixed: 8}.",
        {},
        unit="experts",
    )
    shared: Index = setting("Experts of one more group that sees every token, in every modality.", 0, unit="experts")
    shared_ffn_hidden_size: Count | None = setting(
        "SwiGLU width of each shared expert; default: ffn_hidden_size.", None
    )
    capacity_factor: Positive = setting(
        "An expert takes capacity_factor * (its group's nominal tokens) / (experts of the group) tokens.", 1.0
    )
    capacity_multiple: Count = setting("Tokens per expert are rounded up to this (16 for FP8).", 1, unit="tokens")
    scope: Literal["sequence", "micro_batch"] = setting(
        "Tokens among which an expert chooses: each sequence by itself (the same whatever the micro-batch size) "
        "or the whole micro-batch (the paper's reading).",
        "sequence",
        source="MoMa 2.2 says 'a batch'",
    )
    share: Literal["auto"] | dict[Name, Share] = setting(
        "Nominal share of each modality in the tokens, from which static capacities follow; "
        "auto: measured when the data was prepared.",
        "auto",
    )
    noise: Literal["none", "gumbel"] = setting(
        "Router noise in training: Gumbel-sigmoid, sigmoid(logits + G' - G'').", "none", source="MoMa 2.5"
    )
    threshold_decay: Share = setting(
        "Decay per step of the moving average of each expert's cut-off, which `--routing threshold` decides by; "
        "0: none is kept.",
        0.0,
        source="Expert Threshold, arXiv 2603.11535",
    )


class DepthConfig(Section):
    """Mixture-of-Depths: some layers process only their highest scored tokens (MoMa 2.3; arXiv 2404.02258)."""

    every: Count = setting("Every n-th layer, starting with layer 0, is a Mixture-of-Depths layer.", 2, unit="layers")
    capacity: Fraction = setting("Fraction of each sequence's tokens that the layer processes.", 0.25)
    multiple: Count = setting(
        "Selected tokens per sequence are rounded up to this; TP must divide it.", 8, unit="tokens"
    )
    choice: Literal["mixed", "per_modality"] = setting(
        "mixed: the best tokens of any modality, experts get nominal counts scaled by the capacity and empty slots "
        "are masked; per_modality: each modality keeps its nominal share, so experts stay full.",
        "mixed",
    )


class AuxiliaryRoutersConfig(Section):
    """Routers that predict expert and depth choice from one token, for causal inference (MoMa, section 2.4)."""

    mode: Literal["off", "stage", "joint"] = setting(
        "off: the main run has none, `mmscale train CONFIG --stage auxiliary` adds and trains them after it; joint: "
        "trained along with the main run, without touching it; stage: what that command sets by itself.",
        "off",
    )
    width: Count | None = setting("Inner width; default: half of hidden_size.", None, source="MoMa 2.4")


class ModelConfig(Section):
    """Decoder-only transformer over one sequence of discrete tokens of all modalities."""

    kind: Literal["dense", "moe", "moma"] = setting(
        "dense; moe: one group of mixed-modal experts; moma: a group of experts per modality.", "moma"
    )
    num_layers: Count = setting("Transformer layers, counting Mixture-of-Depths layers.", unit="layers")
    hidden_size: Count = setting("Width of the residual stream.")
    ffn_hidden_size: Count = setting("SwiGLU inner width of the dense FFN and of every expert.")
    num_attention_heads: Count = setting("Query heads.", unit="heads")
    num_query_groups: Count | None = setting(
        "Key/value heads (GQA); default: as many as query heads.", None, unit="heads"
    )
    kv_channels: Count | None = setting("Width of a head; default: hidden_size / num_attention_heads.", None)
    seq_length: Count = setting("Tokens of a packed sequence.", 4096, unit="tokens")
    norm: Literal["pre", "post", "post_per_expert"] = setting(
        "RMSNorm placement: before each sub-layer; after it (Chameleon/Swin, the paper's); or after it with every "
        "expert's output normalised before its gate, which keeps the gate's gradient for every token.",
        "pre",
        source="MoMa 2.2, Chameleon 2.3",
    )
    norm_eps: Positive = setting("Epsilon of RMSNorm.", 1e-5)
    qk_norm: bool = setting("RMSNorm over each head's query and key, before RoPE.", True, source="Chameleon 2.3")
    rope_base: Positive = setting("Base of the rotary position embedding.", 10_000.0)
    tie_embeddings: bool = setting("Share the input embedding with the output layer.", False)
    init_std: Positive = setting(
        "Standard deviation of initial weights; output projections divide it by sqrt(2*layers).", 0.02
    )
    dropout: Share = setting("Dropout after attention and FFN (masks are not the same under every layout).", 0.0)
    experts: ExpertsConfig = setting("Modality groups of experts.", ExpertsConfig())
    depth: DepthConfig | None = setting("Mixture-of-Depths; null: every layer sees every token.", None)
    auxiliary: AuxiliaryRoutersConfig = setting("Auxiliary routers for causal inference.", AuxiliaryRoutersConfig())

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def routes(self) -> bool:
        """Whether anything in the model is chosen among tokens: experts, or depth."""
        return self.kind != "dense" or self.depth is not None

    @property
    def auxiliary_width(self) -> int | None:
        """Inner width of the auxiliary routers in the model; None: it has none."""
        if self.auxiliary.mode == "off" or not self.routes:
            return None
        return self.auxiliary.width or max(1, self.hidden_size // 2)

    @property
    def keeps_thresholds(self) -> bool:
        """Whether the model keeps moving averages of cut-offs."""
        return self.experts.threshold_decay > 0.0 and self.routes

    def is_depth_layer(self, layer: int) -> bool:
        """Whether the layer with this global index (from 0) is a Mixture-of-Depths layer."""
        return self.depth is not None and layer % self.depth.every == 0


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
    fit_patches: Count = setting("Patches that k-means is fitted to, at most.", 200_000, unit="patches")

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
    text: TextTokenizerConfig = setting("Text tokenizer.", TextTokenizerConfig())
    image: ImageTokenizerConfig = setting("Image tokenizer.", ImageTokenizerConfig())
    emoji: EmojiConfig = setting("Settings of the source emoji.", EmojiConfig())
    held_out: Share = setting(
        "Share kept for validation: of documents, by a hash of their ids; of base emoji, by a hash of them.", 0.01
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
    weight: Positive = setting("Relative number of sequences drawn from it.", 1.0)


class DataConfig(Section):
    """What is trained on, and in which order."""

    path: str | None = setting("Folder of a prepared data set.", None)
    blend: tuple[DataSource, ...] = setting("Several prepared data sets with weights, instead of path.", ())
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


class TrainConfig(Section):
    """How long and in which portions."""

    steps: Count = setting("Optimizer steps.", 1000, unit="steps")
    micro_batch_size: Count = setting("Sequences of one forward and backward pass on a rank.", 1, unit="sequences")
    global_batch_size: Count = setting(
        "Sequences of an optimizer step, over all ranks and micro-batches.", 8, unit="sequences"
    )
    eval_every: Index = setting("Evaluate on the held-out split every n steps; 0: only at the end.", 0, unit="steps")
    eval_batches: Count = setting("Global batches of one evaluation.", 8, unit="batches")
    z_loss: Rate = setting("Weight of log(Z)^2 of the output softmax.", 1e-5, source="Chameleon 2.3")
    modality_weights: dict[Name, Rate] = setting("Weight of each modality's token losses; default 1.", {})
    dry_run: bool = setting("Run one batch forward and backward before step 1 to find errors early.", True)


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Positive = setting("Peak learning rate.", 1e-4, source="MoMa Table 5")
    min_lr: Rate = setting("Learning rate at the end of the schedule.", 1e-6)
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "power"] = setting(
        "Decay after warm-up; power: lr * (tokens / power_tokens)^power_exponent, capped at lr.", "linear"
    )
    warmup: Index = setting("Linear warm-up.", 0, unit="steps")
    decay: Index | None = setting(
        "wsd and power: length of the final decay; default: a tenth of the steps.", None, unit="steps"
    )
    power_exponent: float = setting("power: exponent b of lr ~ tokens^b.", -0.51, source="arXiv 2408.13359")
    power_tokens: Positive = setting(
        "power: tokens up to which the learning rate stays at its peak.", 1e9, unit="tokens"
    )
    weight_decay: Rate = setting("Decoupled weight decay of matrices; norms and routers' vectors have none.", 0.1)
    beta1: Share = setting("Adam's decay of the first moment.", 0.9)
    beta2: Share = setting("Adam's decay of the second moment.", 0.95)
    eps: Positive = setting("Adam's epsilon.", 1e-5)
    clip_grad: Rate = setting("Largest norm of the gradient; 0: no clipping.", 1.0)


class AuxiliaryStageConfig(Section):
    """How auxiliary routers are trained: `mmscale train CONFIG --stage auxiliary`, or along with a joint run.

    Batches not given here are those of `train`; a joint run takes its steps and batches from there too.
    """

    steps: Count = setting("Optimizer steps of the stage.", 5000, unit="steps", source="MoMa Table 6")
    micro_batch_size: Count | None = setting(
        "Sequences of one forward pass on a rank; default: train.micro_batch_size.", None, unit="sequences"
    )
    global_batch_size: Count | None = setting(
        "Sequences of an optimizer step, over all ranks; default: train.global_batch_size.", None, unit="sequences"
    )
    calibration_batches: Index = setting(
        "Global batches of training data after the last step, on which thresholds are set so that a token gets as many "
        "experts on average as in training; 0: thresholds stay at 0.5.",
        16,
        unit="batches",
    )
    checkpoint_every: Index = setting("Save every n steps of the stage; 0: only at the end.", 0, unit="steps")
    optim: OptimConfig = setting(
        "Optimizer of the auxiliary routers, in the stage and in joint runs.",
        OptimConfig(weight_decay=0.0),
        source="MoMa Table 6: 1e-4 to 1e-6, linear",
    )


class ParallelConfig(Section):
    """How the model and the batch are spread over ranks; data parallelism is what the other dimensions leave over."""

    tp: Count = setting("Tensor-parallel ranks; above 1 sequence parallelism is always on.", 1, unit="ranks")
    pp: Count = setting("Pipeline stages.", 1, unit="ranks")
    vpp: Count | None = setting("Model chunks per pipeline stage (interleaved schedule).", None, unit="chunks")
    ep: Count = setting("Expert-parallel ranks; each holds experts of every modality.", 1, unit="ranks")
    cp: Count = setting(
        "Context-parallel ranks; only 1: expert choice and depth rank whole sequences.", 1, unit="ranks"
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "Recompute activations in backward: whole layers, or attention only.", "none"
    )
    overlap_grad_reduce: bool = setting("Reduce gradients while backward goes on.", False)
    overlap_param_gather: bool = setting("Gather updated parameters while forward goes on.", False)
    overlap_p2p: bool | None = setting("Overlap pipeline sends with compute; default: when vpp is set.", None)
    batch_p2p: bool | None = setting("Batch pipeline sends and receives; default: when they are not overlapped.", None)


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = setting(
        "Parameters and activations; with bf16 the optimizer keeps fp32 copies.", "bf16"
    )
    fp8: Literal["off"] = setting("FP8 layers; only 'off' so far.", "off")


class CheckpointConfig(Section):
    """When the training state is written, and how much of it is kept."""

    every: Index = setting("Save every n steps; 0: only at the end.", 0, unit="steps")
    keep: Count = setting("Newest checkpoints kept; never fewer than two known to be whole.", 3, unit="checkpoints")
    keep_every: Index = setting("Keep checkpoints of every n-th step for ever; 0: none.", 0, unit="steps")
    allow_missing: bool = setting(
        "Go on from a checkpoint that lacks its manifest, counters, random or optimizer state.", False
    )
    resume: bool = setting("Go on from the run's newest checkpoint if there is one.", True)
    asynchronous: bool = setting(
        "Train on while a forked process of every rank writes; false: the ranks write themselves. A host needs memory "
        "for up to twice the training state.",
        True,
    )
    deadline: Seconds = setting(
        "An asynchronous save that takes longer is given up; training goes on.", 900.0, unit="seconds"
    )
    max_failures: Count = setting("Failed saves in a row that end the attempt (exit 74).", 3, unit="saves")


class AnomalyConfig(Section):
    """What is done about losses and gradients that do not look right, before they reach the weights."""

    window: Count = setting(
        "Applied steps whose median and spread (MAD) say what is usual; half of them are needed for a verdict.",
        128,
        unit="steps",
        source="OLMo-core SkipStepOptimizer: 128",
    )
    threshold: Positive = setting(
        "A loss (of all tokens, of each modality) or gradient norm is a spike this many robust standard deviations "
        "above the median.",
        6.0,
        unit="standard deviations",
        source="OLMo-core SkipStepOptimizer: 6",
    )
    action: Literal["log", "skip", "rollback"] = setting(
        "What follows a spike. log: the step is taken; skip: the batch is left out; rollback: go back to the newest "
        "whole checkpoint and leave out skip_window steps of data.",
        "log",
    )
    budget: Index = setting(
        "Batches left out and roll-backs of the whole run, together; one more ends training (exit 5).",
        10,
        unit="batches or roll-backs",
    )
    skip_window: Count = setting(
        "Steps of data left out after a roll-back, from the checkpoint on; at least up to the batch that spiked.",
        200,
        unit="steps",
        source="PaLM, arXiv 2204.02311, section 5.1: 200-500 batches",
    )


class ResilienceConfig(Section):
    """Going on in spite of faults."""

    max_restarts: Index = setting(
        "Restarts of a launched job after crashes, over all of its attempts; one more gives up (exit 5). Stops on "
        "request, preemptions, lost nodes and time limits do not count.",
        20,
        unit="restarts",
    )
    max_restarts_without_progress: Index = setting(
        "Restarts after crashes in a row without a new checkpoint; one more gives up (exit 5).",
        2,
        unit="restarts",
        source="NVRx ft_launcher: 3 cycles",
    )
    hang_timeout: Seconds | None = setting(
        "No step ends for this long: ranks write down where they stand, and the attempt ends as a crash; default: ten "
        "times the longest time between two steps so far (evaluation and saves included), but five minutes at least.",
        None,
        unit="seconds",
    )
    anomaly: AnomalyConfig = setting("NaN, Inf and spikes.", AnomalyConfig())
    parameter_hash_every: Index = setting(
        "Compare the bytes of replicated parameters every n steps, and name a rank that differs; 0: never.",
        1000,
        unit="steps",
    )
    memory_every: Index = setting(
        "Copy every rank's state into shared memory (/dev/shm) every n steps, with parity against the loss of a rank "
        "or node; a restart on the same layout goes on from there if it is newer than the newest checkpoint. 0: never.",
        0,
        unit="steps",
        source="REFT, arXiv 2310.12670",
    )
    memory_group: Index = setting(
        "Ranks that keep each other's parity, on different nodes where there are enough: one of them may be lost, and "
        "a copy of the state takes 1 / (memory_group - 1) more memory; 2 is a mirror.",
        4,
        unit="ranks",
    )
    memory_hold: Seconds = setting(
        "How long shared memory is kept for a restart after its rank has died.", 1800.0, unit="seconds"
    )


class LogConfig(Section):
    """What is reported while training."""

    every: Count = setting("Log every n steps.", 10, unit="steps")
    tensorboard: bool = setting("Write TensorBoard events into the run folder.", False)
    wandb: str | None = setting("Weights & Biases project; null: off.", None)


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = setting("Where the run lives.", RunConfig())
    vocab: VocabConfig = setting("Token ids.", VocabConfig())
    model: ModelConfig = setting("Architecture.")
    data: DataConfig = setting("Data.", DataConfig())
    train: TrainConfig = setting("Steps and batches.", TrainConfig())
    optim: OptimConfig = setting("Optimizer.", OptimConfig())
    auxiliary: AuxiliaryStageConfig = setting("Training of the auxiliary routers.", AuxiliaryStageConfig())
    parallel: ParallelConfig = setting("Layout.", ParallelConfig())
    precision: PrecisionConfig = setting("Number formats.", PrecisionConfig())
    checkpoint: CheckpointConfig = setting("Checkpoints.", CheckpointConfig())
    resilience: ResilienceConfig = setting("Faults.", ResilienceConfig())
    log: LogConfig = setting("Logs.", LogConfig())
