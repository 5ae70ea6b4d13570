"""Process groups of a run.

Starts torch.distributed and megatron-core's process groups, and provides them as one ProcessGroupCollection. The only
module that imports megatron.core.parallel_state: all others receive their groups, or use this module.

Two levels of initialization, so that one set of processes can use several layouts (0.1 s each; a new process takes 6
s):

    start(env) -> initialize_layout(tp=..., pp=...) -> destroy_layout() -> initialize_layout(...) -> ... -> finalize()

Others call `initialize`, which is `start` plus `initialize_layout`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore, TCPStore

from mmscale.errors import ConfigError
from mmscale.runtime import device, megatron_cpu, transformer_engine
from mmscale.runtime.rank_env import RankEnv

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

# Ranks that hold the same experts, including all tensor-parallel parts. megatron-core has no such group.
_expert_replicas: torch.distributed.ProcessGroup | None = None
_at_end: list[Callable[[], None]] = []  # see `at_end_of_layout`
DEFAULT_TIMEOUT_S = 1800.0  # timeout of a collective [s]


def initialize(
    env: RankEnv,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    cp: int = 1,
    seed: int = 1234,
    init_method: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ProcessGroupCollection:
    """Start torch.distributed and one layout of megatron-core's groups.

    Args:
        env: Place of this process, from `rank_env.discover()`.
        tp: Tensor-parallel size; experts are sharded by the same factor (ETP = TP).
        pp: Pipeline-parallel size.
        vpp: Model chunks per pipeline stage; None or 1 for the plain 1F1B schedule.
        ep: Expert-parallel size, inside the ranks that hold the same dense weights (context- and data-parallel ones).
        cp: Context-parallel size: ranks that share the tokens of a sequence.
        seed: Seed of megatron's random state trackers (dropout, weights); ranks of a tensor-parallel group differ.
        init_method: URL of the rendezvous; that of `env` if None.
        timeout_s: Seconds a collective may take.

    Raises:
        ConfigError: The layout does not fit the world size.
    """
    _check_layout(env.world_size, tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp)  # before any rank waits for others
    start(env, init_method=init_method, timeout_s=timeout_s)
    return initialize_layout(tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp, seed=seed, timeout_s=timeout_s)


def start(env: RankEnv, *, init_method: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Start torch.distributed, nccl on CUDA and gloo elsewhere. Nothing of megatron-core yet."""
    own_device = device.current_device(env.local_rank)
    timeout = timedelta(seconds=timeout_s)
    if env.world_size == 1 and init_method is None:
        # A single process needs no address: no port can be taken, no host name must be resolved.
        torch.distributed.init_process_group(device.backend(), store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = _store(env, timeout) if init_method is None else None
    torch.distributed.init_process_group(
        device.backend(),
        init_method=None if store is not None else init_method or env.init_method,
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
        # With a device given, NCCL connects now, so a broken network is noticed here and not in the first step.
        device_id=own_device if own_device.type == "cuda" else None,
    )


def _store(env: RankEnv, timeout: timedelta) -> TCPStore | None:
    """The store for ranks whose parent opened its port; None for torchrun and SLURM, where torch makes it."""
    if env.source not in ("local", "mpi") or not env.init_method.startswith("tcp:"):
        return None
    # A duplicate, because the store closes its descriptor, and a process may start torch.distributed again.
    listener = None if env.store_fd is None else os.dup(env.store_fd)
    return TCPStore(
        env.master_addr,
        env.master_port,
        env.world_size,
        is_master=env.is_first,
        timeout=timeout,
        master_listen_fd=listener,
    )


def initialize_layout(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    cp: int = 1,
    seed: int = 1234,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ProcessGroupCollection:
    """Make megatron-core's groups for one layout; every rank must call it. Arguments as in `initialize`."""
    _check_layout(torch.distributed.get_world_size(), tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp and vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp,  # ranks exchange complete tokens, so experts are sharded like dense layers
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    _make_expert_replicas(tp=tp, pp=pp, ep=ep, timeout=timedelta(seconds=timeout_s))
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return collection()


def _make_expert_replicas(*, tp: int, pp: int, ep: int, timeout: timedelta) -> None:
    """Find or make the group of `expert_replica_group`."""
    global _expert_replicas
    replicas = torch.distributed.get_world_size() // (tp * pp * ep)
    if ep == 1:
        _expert_replicas = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    elif tp == 1:
        _expert_replicas = parallel_state.get_expert_data_parallel_group()
    elif replicas == 1:
        _expert_replicas = parallel_state.get_tensor_model_parallel_group()
    else:
        # The order of megatron-core's own expert groups.
        order = parallel_state.RankGenerator(tp=tp, ep=ep, dp=replicas, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        for ranks in order.get_ranks("tp-dp"):
            group = parallel_state.create_group(ranks, timeout=timeout, group_desc="EXPERT_REPLICAS")
            if torch.distributed.get_rank() in ranks:
                _expert_replicas = group


def collection() -> ProcessGroupCollection:
    """All groups of the layout; None for groups that this rank is not in (`embd` of a middle stage, `hcp`)."""
    return ProcessGroupCollection.use_mpu_process_groups()


def host_group() -> torch.distributed.ProcessGroup:
    """A new group of all ranks for tensors and objects on the host, whatever device trains. Every rank must call it."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=DEFAULT_TIMEOUT_S))


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank, whatever value others pass; every rank calls it.

    For values read from a folder, because a shared file system may show ranks different things.
    """
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any, *, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in the order of their ranks; every rank of the group calls it.

    Args:
        value: of this rank; any object that can be pickled.
        group: of the ranks that take part; None: all.
    """
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def at_end_of_layout(release: Callable[[], None]) -> None:
    """Call a function when the layout is destroyed. It releases what would keep groups, and their threads, alive."""
    _at_end.append(release)


def destroy_layout() -> None:
    """Undo `initialize_layout`, including the global state of megatron-core and Transformer-Engine.

    Every rank must call it. Models of the layout that the caller has dropped are freed, and with them the threads of
    their groups, which would wake up a hundred times a second each.
    """
    while _at_end:
        _at_end.pop()()
    _forget_layout()
    gc.collect()


def _forget_layout() -> None:
    global _expert_replicas
    _expert_replicas = None
    transformer_engine.forget_scales()
    # destroy_model_parallel() only drops its references; sockets and threads would exist until the process ends.
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    destroy_rerun_state_machine()
    unset_num_microbatches_calculator()
    for group in groups:
        torch.distributed.destroy_process_group(group)
    # It keeps some references (_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP). A group's threads end with the last
    # reference, and a forked rank that drops an inherited group would wait forever for threads that it does not have.
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    RotaryEmbedding.forward.cache_clear()  # its keys hold modules and groups, which a full cache would drop later


def finalize() -> None:
    """Destroy everything. Safe to call twice, and on the error path: it runs no collective and frees no group.

    Freeing one waits for its last collective, which a rank that hangs would never join.
    """
    if not torch.distributed.is_initialized():
        return
    _at_end.clear()
    if parallel_state.model_parallel_is_initialized():
        _forget_layout()
    torch.distributed.destroy_process_group()


def _check_layout(world_size: int, *, tp: int, pp: int, vpp: int | None, ep: int, cp: int) -> None:
    for name, size in (("tp", tp), ("pp", pp), ("vpp", 1 if vpp is None else vpp), ("ep", ep), ("cp", cp)):
        if size < 1:
            raise ConfigError(f"parallel.{name} = {size} is below 1")
    if world_size % (tp * pp):
        raise ConfigError(
            f"parallel: tp*pp = {tp}*{pp} = {tp * pp} does not divide the world size {world_size}",
            remedy="`mmscale plan` lists the layouts that do",
        )
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"parallel: tp*pp*cp = {tp}*{pp}*{cp} = {tp * pp * cp} does not divide the world size {world_size}",
            remedy="`mmscale plan` lists the layouts that do",
        )
    if world_size % (tp * pp * ep):
        raise ConfigError(
            f"parallel: ep = {ep} does not divide the data-parallel size {world_size // (tp * pp)} "
            f"(world size {world_size} / tp*pp {tp * pp})",
            remedy="`mmscale plan` lists the layouts that do",
        )
    if vpp is not None and vpp > 1 and pp == 1:
        raise ConfigError(f"parallel.vpp = {vpp} cuts a pipeline stage in chunks, but parallel.pp = 1")


# --- position of this rank ------------------------------------------------------------------------------------------


def topology() -> dict[str, int]:
    """Ranks of every dimension: equal topologies give every rank the same part of the model and of the batch."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "tp": tensor_parallel_size(),
        "pp": pipeline_size(),
        "vpp": virtual_pipeline_size() or 1,
        "ep": expert_parallel_size(),
        "cp": context_parallel_size(),
    }


def data_parallel_rank() -> int:
    """The index of the part of every global batch that this rank reads."""
    return int(parallel_state.get_data_parallel_rank())


def data_parallel_size() -> int:
    """The number of parts of a global batch."""
    return int(parallel_state.get_data_parallel_world_size())


def context_parallel_rank() -> int:
    """The index of this rank's part of every sequence."""
    return int(parallel_state.get_context_parallel_rank())


def context_parallel_size() -> int:
    """The number of ranks that share a sequence."""
    return int(parallel_state.get_context_parallel_world_size())


def tensor_parallel_size() -> int:
    """Size of the tensor-parallel group."""
    return int(parallel_state.get_tensor_model_parallel_world_size())


def pipeline_rank() -> int:
    """Pipeline stage of this rank."""
    return int(parallel_state.get_pipeline_model_parallel_rank())


def pipeline_size() -> int:
    """Number of pipeline stages."""
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def virtual_pipeline_size() -> int | None:
    """Model chunks per stage; None for the plain schedule (the form megatron-core's schedules take)."""
    size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return None if size is None else int(size)


def expert_parallel_size() -> int:
    """Size of the expert-parallel group."""
    return int(parallel_state.get_expert_model_parallel_world_size())


def expert_replica_group() -> torch.distributed.ProcessGroup:
    """Group of the ranks that hold the same experts, whole or in tensor-parallel parts; they reduce FP8 scales."""
    assert _expert_replicas is not None, "no layout is initialised"
    return _expert_replicas
