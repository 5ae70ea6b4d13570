"""A substitute for the module `torch`, bound only in the modules of megatron-core.

The name `torch` as megatron-core's modules see it on a machine without CUDA. megatron_cpu.py installs it.

A global `TorchFunctionMode` would cost 23-32 % of a training step (2-4 us on every torch call, even `x.shape`); the
proxy costs nothing on an attribute and 0.7 us on a tensor factory.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

# Where the proxy is needed: (module under megatron.core, function, a part of its source). A test checks each line.
TOUCH_POINTS: tuple[tuple[str, str, str], ...] = (
    ("dist_checkpointing.strategies.async_utils", "PersistentAsyncCaller.async_loop", "torch.cuda.set_device"),  # :488
    ("dist_checkpointing.strategies.async_utils", "TemporalAsyncCaller.schedule_async_call", "synchronize"),  # :212
    ("dist_checkpointing.strategies.async_utils", "AsyncCaller.sync_all_async_calls", "cuda.current_device()"),  # :165
    ("dist_checkpointing.strategies.async_utils", "AsyncCallsQueue.maybe_finalize_async_calls", "current_device()"),
    ("dist_checkpointing.strategies.filesystem_async", "FileSystemWriterAsync.preload_tensors", "cuda.synchronize()"),
    ("dist_checkpointing.strategies.state_dict_saver", "save_state_dict_async_finalize", "current_device()"),  # :252
    ("distributed.param_and_grad_buffer", "_ParamAndGradBuffer.__init__", "device=torch.cuda.current_device()"),  # :800
    ("models.common.embeddings.rotary_pos_embedding", "RotaryEmbedding.get_emb", "torch.cuda.current_device()"),  # :162
    ("optimizer.clip_grads", "count_zeros_fp32", "device='cuda'"),  # :207
    ("optimizer.clip_grads", "get_grad_norm_fp32", "device='cuda'"),  # :90, 103, 115
    ("optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero", "current_device()"),  # :1077
    ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__", "device='cuda'"),  # :473-485
    ("optimizer.optimizer", "FP32Optimizer.__init__", "device='cuda'"),  # :907
    ("pipeline_parallel.p2p_communication", "P2PCommunicator._communicate", "device=torch.cuda.current_device()"),
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining", 'device="cuda"'),  # :596
    ("pipeline_parallel.schedules", "forward_backward_pipelining_with_interleaving", 'device="cuda"'),  # :983
    ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving", 'device="cuda"'),  # :2138
    ("rerun_state_machine", "RerunStateMachine.validate_result", "torch.cuda.current_device()"),  # :525
    ("tensor_parallel.data", "_build_key_size_numel_dictionaries", "device='cuda'"),  # :37
    ("tensor_parallel.layers", "LinearWithGradAccumulationAndAsyncCommunication.backward", "cuda.current_device()"),
    ("tensor_parallel.mappings", "_gather_along_first_dim", "device=torch.cuda.current_device()"),  # :141
    ("tensor_parallel.mappings", "_reduce_scatter_along_first_dim", "device=torch.cuda.current_device()"),  # :181
    ("tensor_parallel.random", "CudaRNGStatesTracker.add", "torch.cuda.get_rng_state()"),  # :235
    ("tensor_parallel.random", "model_parallel_cuda_manual_seed", "torch.cuda.manual_seed"),  # :422
    ("timers", "Timers._get_elapsed_time_all_ranks", "device=torch.cuda.current_device()"),  # :303
    ("transformer.utils", "get_default_causal_mask", 'device="cuda"'),  # :35
    ("utils", "GlobalMemoryBuffer.get_tensor", "device=torch.cuda.current_device()"),  # :631
    ("utils", "local_multi_tensor_l2_norm", 'device="cuda"'),  # :1207
)

_CPU = torch.device("cpu")


class _HostCuda(types.ModuleType):
    """Replaces `torch.cuda`: redefines the few functions that megatron-core calls on the training path.

    All other attributes are the real ones. `is_available()` is also the real one and returns False.
    """

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        # tensor_parallel/random.py:55,237 save and restore "the CUDA generator". A host has only the CPU generator, so
        # a dropout mask depends on the layout here; tests that compare layouts use dropout 0.
        self.get_rng_state = lambda device=None: torch.get_rng_state()
        self.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
        self.manual_seed = torch.default_generator.manual_seed
        self.random = self
        # A device, not an index: rotary_pos_embedding.py:162 passes it to `tensor.to(device=...)`, which the proxy does
        # not intercept.
        self.current_device = lambda: _CPU
        # async_utils.py:488 calls set_device(rank % device_count()) in the writer process.
        self.device_count = lambda: 1
        self.set_device = _do_nothing
        self.current_stream = _do_nothing  # param_and_grad_buffer.py of 0.19, start_grad_sync: waits for CUDA graphs
        self.synchronize = _do_nothing  # p2p_communication.py:398, timers.py:152, filesystem_async.py:230

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class HostTorch(types.ModuleType):
    """The module `torch` for megatron-core: factories replace `device="cuda"` by the host, `.cuda` is `_HostCuda`."""

    # fmt: off
    FACTORIES = (
        "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "ones", "ones_like",
        "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
    )
    # fmt: on

    def __init__(self) -> None:
        super().__init__("torch")
        # A copy and not only __getattr__, so that attribute access is as fast as on torch itself.
        self.__dict__.update(vars(torch))
        self.__dict__["cuda"] = _HostCuda()
        for name in self.FACTORIES:
            self.__dict__[name] = _on_host(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:  # for submodules that torch imports late
        return getattr(torch, name)


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and device is not _CPU and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_host


def megatron_modules() -> list[types.ModuleType]:
    """Modules of megatron-core that are already imported."""
    return [m for name, m in list(sys.modules.items()) if name.split(".")[:2] == ["megatron", "core"] and m is not None]


@functools.cache
def _proxy() -> HostTorch:
    return HostTorch()


def rebind_all() -> None:
    """Re-bind `torch` in every module of megatron-core that is already imported."""
    for module in megatron_modules():
        if vars(module).get("torch") is torch:
            module.__dict__["torch"] = _proxy()
