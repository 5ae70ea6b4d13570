"""Common helpers of the checks over Transformer-Engine's Python: settings of a backend, and a machine that has it."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.extensions.transformer_engine import TEDotProductAttention

from mmscale.config import Config
from mmscale.runtime import transformer_engine
from tests.te_on_cpu import pretended_gpu


@pytest.fixture(autouse=True)
def can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Transformer-Engine report that it can run, although there is no CUDA device."""
    monkeypatch.setattr(transformer_engine, "problem", lambda: None)
    # megatron-core would create a stream of the device for context parallelism.
    monkeypatch.setattr(TEDotProductAttention, "cp_stream", pretended_gpu.proxy().cuda.Stream())


def small(made: Config, **model: Any) -> Config:
    """The same model with two micro-batches a step, and other settings of `model`."""
    train = made.train.model_copy(update={"global_batch_size": 2 * made.train.micro_batch_size})
    return made.model_copy(update={"train": train, "model": made.model.model_copy(update=model)})


# Blocks of 128 x 128 are not split between tensor-parallel ranks, so an expert's slots are multiples of 128 too; also
# for bf16, which would otherwise have other capacities.
_BLOCKS = {"hidden_size": 256, "ffn_hidden_size": 256, "seq_length": 256}


def in_whole_blocks(made: Config) -> Config:
    """The same model with sizes that blockwise FP8 supports under tensor parallelism."""
    depth = made.model.depth and made.model.depth.model_copy(update={"multiple": 128})
    experts = made.model.experts.model_copy(update={"capacity_multiple": 128})
    return made.model_copy(
        update={"model": made.model.model_copy(update={**_BLOCKS, "experts": experts, "depth": depth})}
    )


def using(made: Config, backend: str, *, moments: str | None = None, **precision: Any) -> Config:
    """The same model with the classes of a backend, its experts too."""
    experts = made.model.experts.model_copy(update={"compute": "te" if backend == "te" else "bmm"})
    optim = made.optim if moments is None else made.optim.model_copy(update={"moments": moments})
    return made.model_copy(
        update={
            "model": made.model.model_copy(update={"backend": backend, "experts": experts}),
            "precision": made.precision.model_copy(update=precision),
            "optim": optim,
        }
    )
