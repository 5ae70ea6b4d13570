"""Configuration: every setting as a frozen, strict, documented schema; reading, overriding, checking, explaining.

Importing this package does not import torch.
"""

from mmscale.config.schema import (
    AnomalyConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    DepthConfig,
    EmojiConfig,
    ExpertsConfig,
    ImageTokenizerConfig,
    LogConfig,
    ModalityVocab,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    PrepareConfig,
    ResilienceConfig,
    RunConfig,
    Section,
    TextTokenizerConfig,
    TrainConfig,
    VocabConfig,
)

__all__ = [
    "AnomalyConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "DepthConfig",
    "EmojiConfig",
    "ExpertsConfig",
    "ImageTokenizerConfig",
    "LogConfig",
    "ModalityVocab",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PrepareConfig",
    "ResilienceConfig",
    "RunConfig",
    "Section",
    "TextTokenizerConfig",
    "TrainConfig",
    "VocabConfig",
]
