"""Every setting of mmscale: a name, a type, a unit, a default and a meaning.

Only shapes of single values live here and in the schema_*.py beside it, which hold the larger sections. Rules between
settings are in rules.py, reading and overriding in load.py. Nothing here imports torch: the schema is read on login
nodes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.schema_data import (
    DataConfig,
    DataSource,
    EmojiConfig,
    ImageTokenizerConfig,
    PrepareConfig,
    TextTokenizerConfig,
)
from mmscale.config.schema_model import (
    AuxiliaryRoutersConfig,
    DepthConfig,
    ExpertsConfig,
    ModalityVocab,
    ModelConfig,
    VocabConfig,
)
from mmscale.config.schema_precision import PrecisionConfig
from mmscale.config.schema_resilience import AnomalyConfig, CheckpointConfig, ResilienceConfig
from mmscale.config.section import (
    AtLeastOne,
    Count,
    Epsilon,
    Exponent,
    Fraction,
    Index,
    Name,
    Port,
    Positive,
    Rate,
    Seconds,
    Section,
    Seed,
    Share,
    setting,
)

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
    "Rate",
    "ResilienceConfig",
    "RunConfig",
    "Seconds",
    "Section",
    "Share",
    "TextTokenizerConfig",
    "TrainConfig",
    "VocabConfig",
    "setting",
]


class RunConfig(Section):
    """Where a run lives."""

    dir: str = setting("Folder that holds run folders.", "runs")
    name: Name = setting("Name of the run; its folder is run.dir/run.name.", "default")
    seed: Seed = setting("Seed of weights, data order and dropout.", 1234)


class TrainConfig(Section):
    """How long and in which portions."""

    steps: Count = setting("Optimizer steps.", 1000, unit="steps")
    micro_batch_size: Count = setting("Sequences of one forward and backward pass on a rank.", 1, unit="sequences")
    global_batch_size: Count = setting(
        "Sequences of an optimizer step, over all ranks and micro-batches.", 8, unit="sequences"
    )
    eval_every: Index = setting("Evaluate on the held-out split every n steps; 0: only at the end.", 0, unit="steps")
    eval_batches: Count = setting("Global batches of one evaluation.", 8, unit="batches")
    z_loss: Share = setting("Weight of log(Z)^2 of the output softmax.", 1e-5, source="Chameleon 2.3")
    modality_weights: dict[Name, Rate] = setting("Weight of each modality's token losses; default 1.", {})
    dry_run: bool = setting("Run one batch forward and backward before step 1 to find errors early.", True)


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[Positive, Field(le=10.0)] = setting("Peak learning rate.", 1e-4, source="MoMa Table 5")
    min_lr: Rate = setting("Learning rate that the schedule reaches after the last step.", 1e-6)
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "power"] = setting(
        "Decay after warm-up; power: lr * (tokens / power_tokens)^power_exponent, capped at lr.", "linear"
    )
    warmup: Index = setting("Linear warm-up.", 0, unit="steps")
    restart: Index = setting(
        "The schedule begins anew after this step, warm-up included: for a run that is extended. 0: at the start.",
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
    weight_decay: Annotated[Rate, Field(le=10.0)] = setting(
        "Decoupled weight decay of matrices: embeddings and experts' routers too. Vectors (norms' weights, depth "
        "routers) have none.",
        0.1,
    )
    beta1: Share = setting("Adam's decay of the first moment.", 0.9)
    beta2: Share = setting("Adam's decay of the second moment.", 0.95)
    eps: Epsilon = setting("Adam's epsilon.", 1e-5)
    clip_grad: Rate = setting("Largest norm of the gradient; 0: no clipping.", 1.0)
    moments: Literal["fp32", "bf16", "fp8_coat", "te_bf16", "te_fp8"] = setting(
        "How Adam's moments of matrices are kept: fp32 (8 bytes per parameter), bf16 (4), fp8_coat (2.19: E4M3 with "
        "dynamic range expansion in groups of 128); te_bf16 and te_fp8: by Transformer-Engine's FusedAdam, GPU only. "
        "A checkpoint of one is read by a run with another.",
        "fp32",
        source="COAT, arXiv 2410.19313, section 4.1",
    )


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
    pp_layers: tuple[Count, ...] | None = setting(
        "Layers of each pipeline stage; with vpp, of each chunk in the order of the model's layers. Default: equally "
        "many. A shorter first or last stage makes up for the embedding or the output layer.",
        None,
        unit="layers",
        source="mcore pipeline_model_parallel_layout",
    )
    ep: Count = setting(
        "Expert-parallel ranks, over which the experts of every group are spread; where they do not divide a group, "
        "some hold one expert of it less.",
        1,
        unit="ranks",
    )
    cp: Count = setting(
        "Context-parallel ranks; only 1: expert choice and depth rank whole sequences.", 1, unit="ranks"
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "Recompute activations in backward: whole layers, or the parts of them that recompute_modules names.", "none"
    )
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = setting(
        "selective: what is recomputed. core_attn: attention between its projections; mlp: the feed-forward sub-layer, "
        "with experts and their exchange.",
        ("core_attn",),
        source="mcore recompute_modules",
    )
    overlap_grad_reduce: bool | None = setting(
        "Reduce gradients while backward goes on; default: where ranks talk through NCCL.", None
    )
    overlap_param_gather: bool | None = setting(
        "Gather updated parameters while forward goes on; default: as overlap_grad_reduce.", None
    )
    overlap_experts: bool = setting(
        "Exchange each group's tokens by itself, while other groups and shared experts compute; needs ep > 1.", False
    )
    overlap_tensor: bool = setting(
        "Overlap tensor-parallel messages of attention with its products through Transformer-Engine's user buffers; "
        "needs tp > 1, model.backend=te and no Mixture-of-Depths.",
        False,
        source="mcore tp_comm_overlap",
    )
    overlap_p2p: bool | None = setting("Overlap pipeline sends with compute; default: when vpp is set.", None)
    batch_p2p: bool | None = setting("Batch pipeline sends and receives; default: when they are not overlapped.", None)


class LogConfig(Section):
    """What is reported while training."""

    every: Count = setting("Log every n steps.", 10, unit="steps")
    layers_every: Index = setting(
        "Write figures of every layer (expert load, co-selection, depth selection, output norm) into layers.jsonl "
        "every n logged steps, on the first and on the last; 0: never.",
        5,
        unit="logged steps",
    )
    tensorboard: bool = setting("Write TensorBoard events into the run folder.", False)
    wandb: str | None = setting("Weights & Biases project; null: off. Without the service a run goes on.", None)
    prometheus_port: Port | None = setting(
        "Serve the latest figures at http://HOST:PORT/metrics on the host of rank 0; null: off.", None, unit="port"
    )
    prometheus_address: str = setting(
        "Address of the interface that serves them; 127.0.0.1: this host only.",
        "0.0.0.0",  # noqa: S104  # as Prometheus exporters do: the server that asks stands elsewhere
    )


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
