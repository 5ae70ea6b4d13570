"""The sections of a configuration together. Each is in the folder of its topic: optim/schema.py holds `optim`.

Every setting has a type, unit, default and description. Schemas check single values only: rules between settings are
in the rules.py beside them, reading files and overrides is in load.py. Nothing here imports torch, because login nodes
read the schema.
"""

from __future__ import annotations

from mmscale.config.auxiliary.schema import AuxiliaryStageConfig
from mmscale.config.checkpoint.schema import CheckpointConfig
from mmscale.config.data.schema import DataConfig
from mmscale.config.log.schema import LogConfig
from mmscale.config.model.schema import ModelConfig
from mmscale.config.objective.schema import ObjectiveConfig
from mmscale.config.optim.schema import OptimConfig
from mmscale.config.parallel.schema import ParallelConfig
from mmscale.config.precision.schema import PrecisionConfig
from mmscale.config.resilience.schema import ResilienceConfig
from mmscale.config.section import Name, Section, Seed, setting
from mmscale.config.sft.schema import SftStageConfig
from mmscale.config.train.schema import TrainConfig
from mmscale.config.vocab.schema import VocabConfig


class RunConfig(Section):
    """Folder, name and seed of a run."""

    dir: str = setting("Folder that contains the run folders.", "runs")
    name: Name = setting("Name of the run; its folder is run.dir/run.name.", "default")
    seed: Seed = setting("Seed of weights and dropout, and of the data order unless data.seed is set.", 1234)


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = setting("Folder, name and seed of the run.", RunConfig())
    vocab: VocabConfig = setting("Token ids.", VocabConfig())
    model: ModelConfig = setting("Architecture.")
    data: DataConfig = setting("Data sets, their order, and packing.", DataConfig())
    train: TrainConfig = setting("Steps, batches, evaluation and loss.", TrainConfig())
    objective: ObjectiveConfig = setting("Causal masking of documents.", ObjectiveConfig())
    optim: OptimConfig = setting("Optimizer and learning-rate schedule.", OptimConfig())
    auxiliary: AuxiliaryStageConfig = setting("Training of the auxiliary routers.", AuxiliaryStageConfig())
    sft: SftStageConfig = setting("Supervised fine-tuning on conversations.", SftStageConfig())
    parallel: ParallelConfig = setting("Layout of model and batch over ranks.", ParallelConfig())
    precision: PrecisionConfig = setting("Number formats.", PrecisionConfig())
    checkpoint: CheckpointConfig = setting("Saving, keeping and mirroring checkpoints.", CheckpointConfig())
    resilience: ResilienceConfig = setting("Restarts, hangs, anomalies and snapshots in memory.", ResilienceConfig())
    log: LogConfig = setting("Logging during training.", LogConfig())
