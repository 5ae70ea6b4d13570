"""Every setting of mmscale, with type, unit, default and description.

Larger sections are in the schema_*.py files. The schema checks single values only: rules between settings are in
rules.py, reading files and overrides is in load.py. Nothing here imports torch, because login nodes read the schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mmscale.config.data.schema import (
    DataConfig,
    DataSource,
    EmojiConfig,
    ImageTokenizerConfig,
    PrepareConfig,
    TextTokenizerConfig,
)
from mmscale.config.model.schema import (
    AuxiliaryRoutersConfig,
    DepthConfig,
    ExpertsConfig,
    ModalityVocab,
    ModelConfig,
    RopeScalingConfig,
    VocabConfig,
)
from mmscale.config.precision.schema import PrecisionConfig
from mmscale.config.resilience.schema import AnomalyConfig, CheckpointConfig, ResilienceConfig
from mmscale.config.section import (
    AtLeastOne,
    Count,
    Epsilon,
    Exponent,
    Fraction,
    Index,
    Name,
    OneOf,
    PlugIns,
    Port,
    Positive,
    Rate,
    Seconds,
    Section,
    Seed,
    Share,
    setting,
)
from mmscale.tables.settings import LOSSES, MOMENTS, OPTIMIZERS, SCHEDULES

__all__ = [
    "AnomalyConfig",
    "AuxiliaryRoutersConfig",
    "AuxiliaryStageConfig",
    "CheckpointConfig",
    "Config",
    "Count",
    "DataConfig",
    "DataSource",
    "DepthConfig",
    "EmojiConfig",
    "ExpertsConfig",
    "Fraction",
    "ImageTokenizerConfig",
    "Index",
    "LogConfig",
    "ModalityVocab",
    "ModelConfig",
    "Name",
    "OptimConfig",
    "ParallelConfig",
    "Positive",
    "PrecisionConfig",
    "PrepareConfig",
    "ProfileConfig",
    "Rate",
    "ResilienceConfig",
    "RopeScalingConfig",
    "RunConfig",
    "Seconds",
    "Section",
    "Share",
    "StopWhenConfig",
    "TextTokenizerConfig",
    "TrainConfig",
    "VocabConfig",
    "setting",
]


class RunConfig(Section):
    """Folder, name and seed of a run."""

    dir: str = setting("Folder that contains the run folders.", "runs")
    name: Name = setting("Name of the run; its folder is run.dir/run.name.", "default")
    seed: Seed = setting("Seed of weights and dropout, and of the data order unless data.seed is set.", 1234)


class StopWhenConfig(Section):
    """When training ends before its last step because held-out losses do not improve any more."""

    metric: str = setting(
        "Held-out figure, by its name in metrics.jsonl: eval/loss, eval/loss/image, eval/causal/loss, "
        "eval/validation/NAME/loss, eval/source/NAME/loss. Lower is better.",
        "eval/loss",
    )
    patience: Count = setting(
        "Number of evaluations in a row without a new lowest value after which training saves and ends (exit 0).",
        5,
        unit="evaluations",
    )


class TrainConfig(Section):
    """Number of steps, batch sizes, evaluation and loss weights."""

    steps: Count = setting("Optimizer steps.", 1000, unit="steps")
    micro_batch_size: Count = setting("Sequences of one forward and backward pass on a rank.", 1, unit="sequences")
    global_batch_size: Count = setting(
        "Sequences of an optimizer step, over all ranks and micro-batches.", 8, unit="sequences"
    )
    eval_every: Index = setting("Evaluate on the held-out split every n steps; 0: only at the end.", 0, unit="steps")
    eval_batches: Count = setting("Global batches of one evaluation.", 8, unit="batches")
    eval_sources: bool = setting(
        "With data.blend, also evaluate the held-out documents of each source separately. Evaluating a source takes as "
        "long as evaluating the blend.",
        True,
    )
    loss: Annotated[str, OneOf(LOSSES, plugin="loss")] = setting(
        f"Loss that the main stage minimises. {LOSSES.help} Held-out losses are always cross entropy.",
        "cross_entropy",
    )
    loss_args: dict[Name, Any] = setting("Keyword arguments of a loss that is a plug-in.", {})
    tasks: tuple[str, ...] = setting(
        "Questions that are asked at every evaluation: names of tasks of the training data (data.prepare.tasks), or "
        "[NAME=]FILE.jsonl. Accuracies are in metrics.jsonl as eval/accuracy/NAME.",
        (),
    )
    stop_when: StopWhenConfig | None = setting(
        "End training early; null: train to the last step. A run that ended early continues only if this is changed.",
        None,
    )
    z_loss: Share = setting("Weight of log(Z)^2 of the output softmax.", 1e-5, source="Chameleon 2.3")
    modality_weights: dict[Name, Rate] = setting("Weight of each modality's token losses; default 1.", {})
    hooks: Annotated[dict[str, dict[str, Any]], PlugIns("hook")] = setting(
        "Plug-ins that are called at points of the run's life, in this order, each with its keyword arguments.", {}
    )
    dry_run: bool = setting("Run one batch forward and backward before step 1 to find errors early.", True)


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[Positive, Field(le=10.0)] = setting("Peak learning rate.", 1e-4, source="MoMa Table 5")
    min_lr: Rate = setting("Learning rate that the schedule reaches after the last step.", 1e-6)
    schedule: Annotated[str, OneOf(SCHEDULES, plugin="schedule")] = setting(
        f"Learning rate after the warm-up. {SCHEDULES.help}", "linear"
    )
    schedule_args: dict[Name, Any] = setting("Keyword arguments of a schedule that is a plug-in.", {})
    warmup: Index = setting("Linear warm-up.", 0, unit="steps")
    restart: Index = setting(
        "Step after which the schedule starts again, with its warm-up, in a run that is extended. 0: at the start.",
        0,
        unit="steps",
    )
    decay: Index | None = setting(
        "wsd and power: length of the final decay; default: a tenth of the steps.", None, unit="steps"
    )
    power_exponent: Exponent = setting("power: exponent b of lr ~ tokens^b.", -0.51, source="arXiv 2408.13359")
    power_tokens: AtLeastOne = setting(
        "power: tokens up to which the learning rate stays at its peak.", 1e9, unit="tokens"
    )
    optimizer: Annotated[str, OneOf(OPTIMIZERS, plugin="optimizer")] = setting(
        f"Update of the parameters. {OPTIMIZERS.help}", "adamw"
    )
    optimizer_args: dict[Name, Any] = setting("Keyword arguments of an optimizer that is a plug-in.", {})
    weight_decay: Annotated[Rate, Field(le=10.0)] = setting(
        "Decoupled weight decay of matrices, including embeddings and experts' routers. Vectors (norm weights, "
        "depth routers) have none.",
        0.1,
    )
    beta1: Share = setting("Adam's decay of the first moment.", 0.9)
    beta2: Share = setting("Adam's decay of the second moment.", 0.95)
    eps: Epsilon = setting("Adam's epsilon.", 1e-5)
    clip_grad: Rate = setting("Largest norm of the gradient; 0: no clipping.", 1.0)
    grad_norm_skip_threshold: Positive | None = setting(
        "Skip a batch if its gradient norm before clipping is above this value, whatever resilience.anomaly.action is; "
        "skipped batches count in resilience.anomaly.budget. null: no limit.",
        None,
        source="mcore grad_norm_skip_threshold",
    )
    moments: Annotated[str, OneOf(MOMENTS)] = setting(
        f"Storage of Adam's moments of matrices. {MOMENTS.help} A run with one setting reads checkpoints with another.",
        "fp32",
        source="COAT, arXiv 2410.19313, section 4.1",
    )


class AuxiliaryStageConfig(Section):
    """Training of auxiliary routers: `mmscale train CONFIG --stage auxiliary`, or together with a joint run.

    Batch sizes that are not given default to those of `train`. A joint run takes its steps and batches from `train`
    too.
    """

    steps: Count = setting("Optimizer steps of the stage.", 5000, unit="steps", source="MoMa Table 6")
    micro_batch_size: Count | None = setting(
        "Sequences of one forward pass on a rank; default: train.micro_batch_size.", None, unit="sequences"
    )
    global_batch_size: Count | None = setting(
        "Sequences of an optimizer step, over all ranks; default: train.global_batch_size.", None, unit="sequences"
    )
    calibration_batches: Index = setting(
        "Global batches of training data on which thresholds are calibrated after the last step, so that a token gets "
        "on average as many experts as in training; 0: thresholds stay at 0.5.",
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
    """The layout of model and batch over ranks. Data parallelism uses the ranks that the other dimensions leave."""

    tp: Count = setting("Tensor-parallel ranks; above 1 sequence parallelism is always on.", 1, unit="ranks")
    pp: Count = setting("Pipeline stages.", 1, unit="ranks")
    vpp: Count | None = setting("Model chunks per pipeline stage (interleaved schedule).", None, unit="chunks")
    pp_layers: tuple[Count, ...] | None = setting(
        "Layers of each pipeline stage; with vpp, of each chunk in the order of the model's layers. Default: equal "
        "numbers. A shorter first or last stage compensates for the embedding or the output layer.",
        None,
        unit="layers",
        source="mcore pipeline_model_parallel_layout",
    )
    ep: Count = setting(
        "Expert-parallel ranks, which share the experts of every group; if the number of experts is not divisible, "
        "some ranks have one expert less.",
        1,
        unit="ranks",
    )
    cp: Count = setting(
        "Context-parallel ranks, which share the tokens of every sequence. Experts and depth layers still choose among "
        "all of its tokens. Needs data.document_multiple.",
        1,
        unit="ranks",
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "Recompute activations in the backward pass. full: whole layers; selective: the parts in recompute_modules.",
        "none",
    )
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = setting(
        "selective: parts to recompute. core_attn: attention between its projections; mlp: the feed-forward sub-layer, "
        "with experts and their exchange.",
        ("core_attn",),
        source="mcore recompute_modules",
    )
    loss_chunk: Index = setting(
        "Compute output layer and loss in chunks of this many tokens, so that logits exist only for one chunk at a "
        "time. The backward pass computes the logits again. 0: all tokens at once.",
        0,
        unit="tokens",
    )
    overlap_grad_reduce: bool | None = setting(
        "Reduce gradients during the backward pass; default: on with NCCL, off with gloo.", None
    )
    overlap_param_gather: bool | None = setting(
        "Gather updated parameters during the forward pass; default: the value of overlap_grad_reduce.", None
    )
    overlap_experts: bool = setting(
        "Exchange the tokens of each group separately, while other groups and shared experts compute; needs ep > 1.",
        False,
    )
    overlap_tensor: bool = setting(
        "Overlap tensor-parallel messages of attention with its products through Transformer-Engine's user buffers; "
        "needs tp > 1, model.backend=te and no Mixture-of-Depths.",
        False,
        source="mcore tp_comm_overlap",
    )
    overlap_p2p: bool | None = setting("Overlap pipeline sends with compute; default: when vpp is set.", None)
    batch_p2p: bool | None = setting("Batch pipeline sends and receives; default: when they are not overlapped.", None)


class ProfileConfig(Section):
    """Steps that torch's profiler records (`log.profile`)."""

    start: Count = setting("First step that is recorded.", 10, unit="steps")
    steps: Count = setting("Number of steps; a trace takes several megabytes per step.", 3, unit="steps")
    ranks: tuple[Index, ...] = setting("Ranks that record; each writes its own file.", (0,), unit="ranks")


class LogConfig(Section):
    """Logging during training."""

    every: Count = setting("Log every n steps.", 10, unit="steps")
    layers_every: Index = setting(
        "Write figures of every layer (expert load, co-selection, depth selection, output norm) into layers.jsonl "
        "every n logged steps, and on the first and the last step; 0: never.",
        5,
        unit="logged steps",
    )
    profile: ProfileConfig | None = setting(
        "Record a few steps of a stage with torch's profiler into <run>/profile; null: off.", None
    )
    tensorboard: bool = setting("Write TensorBoard events into the run folder.", False)
    wandb: str | None = setting(
        "Weights & Biases project; null: off. A run continues if the service does not answer.", None
    )
    mlflow: str | None = setting(
        "MLflow experiment at MLFLOW_TRACKING_URI, by default files in <run>/mlflow; null: off. A run continues if the "
        "service does not answer.",
        None,
    )
    sinks: Annotated[dict[str, dict[str, Any]], PlugIns("sink")] = setting(
        "Plug-ins that get the figures of logged steps, each with its keyword arguments.", {}
    )
    prometheus_port: Port | None = setting(
        "Serve the latest figures at http://HOST:PORT/metrics on the host of rank 0; null: off.", None, unit="port"
    )
    prometheus_address: str = setting(
        "Address of the interface that serves the figures; 127.0.0.1: this host only.",
        "0.0.0.0",  # noqa: S104  # as other Prometheus exporters: the server runs on another host
    )


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = setting("Folder, name and seed of the run.", RunConfig())
    vocab: VocabConfig = setting("Token ids.", VocabConfig())
    model: ModelConfig = setting("Architecture.")
    data: DataConfig = setting("Data sets, their order, and packing.", DataConfig())
    train: TrainConfig = setting("Steps, batches, evaluation and loss.", TrainConfig())
    optim: OptimConfig = setting("Optimizer and learning-rate schedule.", OptimConfig())
    auxiliary: AuxiliaryStageConfig = setting("Training of the auxiliary routers.", AuxiliaryStageConfig())
    parallel: ParallelConfig = setting("Layout of model and batch over ranks.", ParallelConfig())
    precision: PrecisionConfig = setting("Number formats.", PrecisionConfig())
    checkpoint: CheckpointConfig = setting("Saving, keeping and mirroring checkpoints.", CheckpointConfig())
    resilience: ResilienceConfig = setting("Restarts, hangs, anomalies and snapshots in memory.", ResilienceConfig())
    log: LogConfig = setting("Logging during training.", LogConfig())
