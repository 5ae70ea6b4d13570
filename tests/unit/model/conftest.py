"""Fixtures that build tiny models in one process. What runs and compares them is in comparison.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.model.build import build_chunks
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv


@pytest.fixture(scope="module")
def process_groups() -> Iterator[ProcessGroupCollection]:
    """Groups of a single process. Ended with the module: tests that fork ranks must not inherit them."""
    groups.finalize()
    yield groups.initialize(RankEnv())
    groups.finalize()


@pytest.fixture
def build(process_groups: ProcessGroupCollection) -> Callable[..., GPTModel]:
    """Builds the model of a configuration; `randomised` gives every parameter, norms too, weights that matter."""

    def make(config: Config, *, randomised: bool = True) -> GPTModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (model,) = build_chunks(config, process_groups)
        if randomised:
            generator = torch.Generator().manual_seed(7)
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # 0.3: activations of order one, sigmoids far from saturation and clearly different from each other.
                parameter.data.copy_(1.0 + 0.3 * noise if "norm" in name else 0.3 * noise)
        return model

    return make
