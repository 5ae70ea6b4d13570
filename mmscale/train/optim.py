"""From model chunks to what an optimizer step needs: gradient buffers (DDP) and megatron's distributed optimizer.

The learning rate comes from schedule.py and is written into the parameter groups before every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mmscale.config import Config
from mmscale.model.build import DTYPES
from mmscale.train import adam

# Elements of a gradient bucket with overlapped communication; None: megatron's own choice, at least 40 million.
BUCKET_ELEMENTS: int | None = None


def wrap(
    config: Config, transformer: TransformerConfig, chunks: list[Any], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Put each chunk into Float16Module (bf16) and DDP, and connect DDP with megatron's schedules.

    The distributed optimizer is used at every size, also on one rank: the plain optimizers cannot read its checkpoints.
    """
    overlap_grads, overlap_params = config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather
    ddp_config = DistributedDataParallelConfig(
        bucket_size=BUCKET_ELEMENTS,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grads,
        overlap_param_gather=overlap_params,
        use_distributed_optimizer=True,
    )
    modules: list[MegatronModule] = [
        Float16Module(transformer, chunk) if transformer.bf16 else chunk for chunk in chunks
    ]
    wrapped = [
        DistributedDataParallel(
            config=transformer,
            ddp_config=ddp_config,
            module=module,
            # Later chunks of an interleaved stage are not on the critical path.
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, module in enumerate(modules)
    ]

    def of_chunks(functions: list[Callable[..., Any]]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    if overlap_grads:
        transformer.no_sync_func = of_chunks([chunk.no_sync for chunk in wrapped])
        transformer.grad_sync_func = (
            of_chunks([chunk.start_grad_sync for chunk in wrapped]) if len(wrapped) > 1 else None
        )
    if overlap_params and len(wrapped) > 1:
        transformer.param_sync_func = of_chunks([chunk.start_param_sync for chunk in wrapped])
    transformer.finalize_model_grads_func = finalize_model_grads
    return wrapped


def make_optimizer(
    config: Config, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW over all chunks, sharded over data-parallel ranks; one optimizer for dense, one for expert parameters."""
    adam.install()
    optim, dtype = config.optim, DTYPES[config.precision.dtype]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=False, pg_collection=groups)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, config: Config, lr: float) -> None:
    """Write the learning rate and weight decay of the coming step into all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.optim.weight_decay * group.get("wd_mult", 1.0)
