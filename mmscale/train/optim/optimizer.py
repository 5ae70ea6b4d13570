"""Wraps model chunks with gradient buffers (DDP) and creates megatron's distributed optimizer.

megatron-core's `step()` measures, clips and applies in one call. Here it is split into `measure` and `apply`, so that a
step can be checked before it reaches the weights.

schedule.py computes the learning rate, which is written into the parameter groups before every step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.config import Config, OptimConfig
from mmscale.config.derived import orthogonalizes, overlap_data_parallel
from mmscale.errors import ConfigError
from mmscale.model.build import DTYPES
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.megatron_versions import grads_for_norm
from mmscale.tables import plugins
from mmscale.tables.plugins import Use
from mmscale.tables.settings import MOMENTS, OPTIMIZERS
from mmscale.train.optim import adam
from mmscale.train.optim.adam import HostFusedAdam
from mmscale.train.optim.adam_compact import CompactAdam
from mmscale.train.optim.finalize import finalize
from mmscale.train.optim.matrix_layout import matrix_layouts
from mmscale.train.optim.muon import Muon
from mmscale.train.optim.shards import save_shardwise

# Elements of a gradient bucket with overlapped communication; None: megatron's own choice, at least 40 million.
BUCKET_ELEMENTS: int | None = None


def wrap(
    config: Config, transformer: TransformerConfig, chunks: list[Any], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Float16Module (bf16) and DDP, and connect DDP with megatron's schedules.

    The distributed optimizer is used at every size, also on one rank, because megatron's other optimizers cannot read
    its checkpoints.
    """
    overlap_grads, overlap_params = overlap_data_parallel(config, nccl=device.has_cuda())
    ddp_config = DistributedDataParallelConfig(
        bucket_size=BUCKET_ELEMENTS,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grads,
        overlap_param_gather=overlap_params,
        use_distributed_optimizer=True,
        pad_buckets_for_high_nccl_busbw=aligned_shards(config.optim.moments),
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
    for chunk in wrapped:
        process_groups.at_end_of_layout(functools.partial(_release, weakref.ref(chunk)))

    def of_chunks(functions: list[Callable[..., Any]]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    if overlap_grads:
        transformer.no_sync_func = of_chunks([chunk.no_sync for chunk in wrapped])
        transformer.grad_sync_func = (
            of_chunks([chunk.start_grad_sync for chunk in wrapped]) if len(wrapped) > 1 else None
        )
    if overlap_params and len(wrapped) > 1:
        transformer.param_sync_func = of_chunks([chunk.start_param_sync for chunk in wrapped])
    transformer.finalize_model_grads_func = finalize
    return wrapped


def _release(alive: weakref.ref[DistributedDataParallel]) -> None:
    """Break the references of a chunk to itself that pass through autograd's graph, where Python's collector is blind.

    The optimizer's shard of an fp32 weight is a view of the weight (distrib_optimizer.py). Its node in the graph leads
    to DDP's hooks, which hold the chunk, and the weight has the shard as an attribute.
    """
    chunk = alive()
    if chunk is None:
        return
    for node in chunk.grad_accs:
        handle = node.register_hook(lambda *_: None)  # the way to the hooks of a node
        handle.hooks_dict_ref().clear()
    chunk.grad_accs.clear()
    for parameter in chunk.parameters():
        vars(parameter).pop("main_param", None)


def aligned_shards(moments: str) -> bool:
    """Whether buckets are padded to 2^16, so that no rank's part of a parameter starts inside a cell of FP8 moments.

    Without padding the size of a bucket is a multiple of 128 and of the number of ranks, so that with four or more
    ranks a part could start anywhere.
    """
    return MOMENTS[moments].in_groups


def make_optimizer(
    config: Config, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW or Muon over all chunks, sharded over data-parallel ranks: one for dense and one for expert parameters."""
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
        overlap_param_gather=overlap_data_parallel(config, nccl=device.has_cuda())[1],
        **precision_aware(optim.moments),
    )
    with contextlib.ExitStack() as stack:
        if (made := optimizer_class(optim)) is not None:
            stack.enter_context(adam.made_by(made[0], **made[1]))
        optimizer = get_megatron_optimizer(
            optimizer_config, chunks, use_gloo_process_groups=False, pg_collection=groups
        )
    parts = save_shardwise(optimizer)
    if orthogonalizes(optim):
        named = [entry for chunk in chunks for entry in chunk.named_parameters()]
        layouts = matrix_layouts(config, named, tensor_parallel=groups.tp.size())
        for part in parts:
            part.hold_matrices(layouts, groups.tp)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def optimizer_class(optim: OptimConfig) -> tuple[type[HostFusedAdam], dict[str, Any]] | None:
    """The class that updates this rank's shards, and its options besides Adam's; None: megatron-core's own choice.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    compact = {"moments": optim.moments} if MOMENTS[optim.moments].compact else {}
    if orthogonalizes(optim):
        return Muon, {"settings": optim.muon, "moments": optim.moments}
    if optim.optimizer in OPTIMIZERS:
        return (CompactAdam, compact) if compact else None
    use = Use("optimizer", "optim.optimizer", optim.optimizer, optim.optimizer_args)
    plugins.check(use)
    own: Any = plugins.load(use)
    options = plugins.arguments(use, own)
    if not compact:
        return own, options
    # Combines both classes: `update` is the plug-in's; chunks and stored state are CompactAdam's.
    return type(f"Compact{own.__name__}", (own, CompactAdam), {}), options | compact


def precision_aware(moments: str) -> dict[str, Any]:
    """megatron-core's settings for moments that Transformer-Engine's FusedAdam stores; empty for all others.

    Raises:
        ConfigError: Transformer-Engine is not installed. megatron-core would report that only in the middle of the
            start.
    """
    name = MOMENTS[moments].te_dtype
    if name is None:
        return {}
    dtype = getattr(torch, name)
    if not distrib_optimizer.USING_TE_OPTIMIZER:
        raise ConfigError(
            f"optim.moments = {moments} needs Transformer-Engine's FusedAdam, which is not installed here",
            remedy="use optim.moments=bf16 or fp8_coat, which need nothing, or install it (`mmscale doctor`)",
        )
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": dtype,
        "exp_avg_sq_dtype": dtype,
        # True, megatron-core's default, keeps only the lower 16 bits of master weights. A save would write those under
        # the master weights' names, and no other optimizer could read them.
        "store_param_remainders": False,
    }


def set_learning_rate(optimizer: MegatronOptimizer, config: Config, lr: float) -> None:
    """Write the learning rate and weight decay of the coming step into all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.optim.weight_decay * group.get("wd_mult", 1.0)


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Restore moments, main parameters and step counts from a checkpoint; hyperparameters stay the configuration's.

    Otherwise a run would continue with the old learning rate, which happened to OPT-175B.
    """
    configured = [_hyperparameters(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded)
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group that the configuration sets; parameters and their step count are state."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


@torch.no_grad()
def measure(optimizer: MegatronOptimizer, sums: Tensor, groups: ProcessGroupCollection) -> tuple[float, Tensor]:
    """The gradient norm and the loss sums of the whole batch, the same on every rank, in one reduction.

    The norm needs this reduction anyway, so the loss sums are added to it and all pipeline stages know the losses
    before the step is applied. This is the only time that a step waits for the device. The arithmetic is
    megatron-core's (clip_grads.py, get_grad_norm_fp32), whose reduction has no room for more values.

    Args:
        optimizer: its gradients are already reduced and divided.
        sums: loss sums of this rank's micro-batches; zeros before the last pipeline stage.
        groups: process groups.

    Returns:
        The norm, NaN if any gradient or loss of any rank is not finite; the reduced sums, fp64 on the host.
    """
    optimizer.prepare_grads()
    counted: list[Tensor] = []
    # Gradients that the norm leaves out on this rank, because the copy of another tensor-parallel rank or pipeline
    # stage is counted. They are checked too: an Inf in one of them would otherwise be applied unnoticed.
    uncounted: list[Tensor] = []
    for part in _parts(optimizer):
        mine = grads_for_norm(part)
        in_norm = {id(grad) for grad in mine}
        counted += mine
        name = "decoupled_grad" if _decoupled(part) else "grad"
        everything = (getattr(param, name, None) for param in part.get_parameters())
        uncounted += [grad for grad in everything if grad is not None and id(grad) not in in_norm]
    broken = ~torch.isfinite(sums).all()
    if uncounted:
        broken = broken | ~torch.isfinite(torch.stack(torch._foreach_norm(uncounted))).all()
    square = sums.new_zeros((), dtype=torch.float64)
    if counted:
        square = torch.nn.utils.get_total_norm(counted).to(sums.device, torch.float64).square()
    mine_sums = sums.double() if groups.tp.rank() == 0 else torch.zeros_like(sums, dtype=torch.float64)
    total = torch.cat((torch.stack((square, broken.double())), mine_sums.flatten()))
    torch.distributed.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    total = total.cpu()
    norm = math.sqrt(float(total[0])) if total[1] == 0 and total[0] >= 0 else math.nan
    return norm, total[2:].view(sums.shape)


@torch.no_grad()
def apply(optimizer: MegatronOptimizer, norm: float) -> bool:
    """Clip the gradients with the norm from `measure`, and update the weights."""
    for part in _parts(optimizer):
        params = part.get_parameters()
        if params and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                params, max_norm=part.config.clip_grad, total_norm=norm, use_decoupled_grad=_decoupled(part)
            )
    return bool(optimizer.step_with_ready_grads())


def _decoupled(part: Any) -> bool:
    """Whether gradients are in `decoupled_grad` instead of `grad`: Transformer-Engine's Adam with bf16 parameters."""
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of dense and of expert parameters, without those that have no parameters on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
