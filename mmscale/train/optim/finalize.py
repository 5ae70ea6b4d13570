"""Finishes the gradients after the last micro-batch: reduces them and divides by the number of trained labels.

Replaces megatron-core's finalize_model_grads and gives the same numbers. It omits the `if num_tokens > 0`, which reads
from the device and so leaves the device idle before the optimizer's kernels are queued.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def finalize(
    model: list[Any],
    num_tokens: Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Called by megatron-core's schedules; arguments as for finalize_model_grads.

    Args:
        model: the wrapped chunks of this rank.
        num_tokens: int32 scalar, trained labels of this rank's micro-batches; only the last pipeline stage's counts.
        pg_collection: process groups.
        force_all_reduce: all-reduce gradients instead of reduce-scattering them into shards.
    """
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    if num_tokens is None:
        return
    assert pg_collection is not None, "the stepper gives its groups to the schedule"
    pipeline = pg_collection.pp
    if pipeline.size() > 1:
        last = torch.distributed.get_global_rank(pipeline, pipeline.size() - 1)
        torch.distributed.broadcast(num_tokens, src=last, group=pipeline)
    torch.distributed.all_reduce(num_tokens, group=pg_collection.dp_cp)
    scaling = torch.where(num_tokens > 0, 1.0 / num_tokens, 1.0)
    for chunk in model:
        chunk.scale_gradients(scaling)
