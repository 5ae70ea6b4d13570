"""Configuration: every setting as a frozen, strict, documented schema; reading, overriding, checking, explaining.

Importing this package does not import torch.
"""

from mmscale.config.checkpoint.schema import CheckpointConfig
from mmscale.config.data.schema import (
    DataConfig,
    DataSource,
    ImageTokenizerConfig,
    PrepareConfig,
    TextTokenizerConfig,
)
from mmscale.config.experts.schema import ExpertsConfig
from mmscale.config.log.schema import LogConfig
from mmscale.config.model.schema import DepthConfig, ModelConfig, RopeScalingConfig
from mmscale.config.optim.schema import MuonConfig, OptimConfig
from mmscale.config.parallel.schema import ParallelConfig
from mmscale.config.precision.schema import PrecisionConfig
from mmscale.config.resilience.schema import AnomalyConfig, ResilienceConfig
from mmscale.config.schema import Config, RunConfig
from mmscale.config.section import Section
from mmscale.config.train.schema import TrainConfig
from mmscale.config.vocab.schema import ModalityVocab, VocabConfig

__all__ = [
    "AnomalyConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "DepthConfig",
    "ExpertsConfig",
    "ImageTokenizerConfig",
    "LogConfig",
    "ModalityVocab",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PrepareConfig",
    "ResilienceConfig",
    "RopeScalingConfig",
    "RunConfig",
    "Section",
    "TextTokenizerConfig",
    "TrainConfig",
    "VocabConfig",
]
