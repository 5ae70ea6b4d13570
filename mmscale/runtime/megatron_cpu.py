"""The CPU adaptor of megatron-core.

Makes megatron-core 0.16.1, which requires a GPU, train on CPU over gloo. A no-op if CUDA is available. It does not
pretend that CUDA is available: `torch` and all libraries other than megatron-core see the real machine.

How it works: every `megatron.core.*` module looks up the global name `torch` at each use, so re-binding that one name
in each module to a proxy (megatron_proxy.py) reaches all of them. Everything that the proxy cannot reach is patched
here.

Call `install()` once before megatron-core is used. `PATCHES` lists every change with its reason. The `still_needed()`
of a patch, called in a process without `install()`, returns whether megatron-core still needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmscale.runtime.megatron_proxy import megatron_modules, rebind_all

# The modules that the training path imports directly, and those that megatron-core imports late inside functions. A
# module that is imported after `install()` needs a `rebind()`.
MODULES: tuple[str, ...] = (
    "megatron.core",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
)

_installed = False


def rebind() -> None:
    """Re-bind `torch` in megatron-core modules imported since `install()`. Cheap; a no-op where CUDA exists."""
    if _installed:
        rebind_all()


def _disable_jit() -> None:
    jit = importlib.import_module("megatron.core.jit")
    jit.disable_jit_fuser()
    # Modules that were imported before `install()` hold compiled functions; replace them by the original ones.
    for module in megatron_modules():
        if "jit_fuser" in vars(module):
            module.__dict__["jit_fuser"] = jit.jit_fuser
        for name, value in list(vars(module).items()):
            _set_plain(module, name, value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                for attribute, member in list(vars(value).items()):
                    _set_plain(value, attribute, member)


def _set_plain(owner: Any, name: str, value: Any) -> None:
    if isinstance(value, types.FunctionType) and "_torchdynamo_orig_callable" in vars(value):
        setattr(owner, name, vars(value)["_torchdynamo_orig_callable"])


def _set_rng_directly() -> None:
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._set_cuda_rng_state = _set_cuda_rng_state


def _add_fp8_names() -> None:
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if hasattr(module, "FP8GlobalStateManager"):
        return
    state = types.SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
    module.FP8GlobalStateManager = state
    module.activation_recompute_forward = lambda **_: contextlib.nullcontext()
    module.fp8_autocast = lambda **_: contextlib.nullcontext()


# Functions that compare `tensor.type()` with "torch.cuda.FloatTensor". The proxy cannot change methods of tensors.
_TYPE_CHECKS = (
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),  # clip_grads.py:167
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),  # :361, 420
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),  # :582
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),  # optimizer.py:671, 690
)


def _function(module: str, qualified_name: str) -> Any:
    """The function with the name `class.method` or `function` in `megatron.core.<module>`, without its wrappers."""
    found: Any = importlib.import_module(f"megatron.core.{module}")
    for part in qualified_name.split("."):
        found = inspect.getattr_static(found, part)
    return inspect.unwrap(getattr(found, "__func__", found))


def _host_constants(constant: Any) -> Any:
    """Replaces `'torch.cuda.FloatTensor'` by `'torch.FloatTensor'` in the constants of a code object, at any depth."""
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.")
    if isinstance(constant, tuple):
        return tuple(_host_constants(item) for item in constant)
    return constant


def _name_host_types() -> None:
    # The names are constants of four functions. Patching `Tensor.type` instead would affect every library, and the
    # patch would be called twice under any TorchFunctionMode.
    for module, name in _TYPE_CHECKS:
        function = _function(module, name)
        function.__code__ = function.__code__.replace(co_consts=_host_constants(function.__code__.co_consts))


def _cuda_method_stays_on_host() -> None:
    original = torch.Tensor.cuda
    if hasattr(original, "_mmscale_original"):
        return

    @functools.wraps(original)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return self
        return original(self, *args, **kwargs)  # other callers get torch's own error

    cuda._mmscale_original = original  # type: ignore[attr-defined]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]


def _skip_collectives_of_one_rank() -> None:
    """Skip gathering or reducing a buffer over a single rank into itself: a no-op for NCCL, but not for gloo."""
    module: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def run(
            output: torch.Tensor, source: torch.Tensor, *, group: Any, async_op: bool = False, **options: Any
        ) -> Any:
            if group.size() == 1 and not async_op and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, group=group, async_op=async_op, **options)

        return run

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(module, name, unless_alone(getattr(module, name)))


@dataclass(frozen=True)
class Patch:
    """One change to megatron-core."""

    name: str
    where: str  # megatron-core 0.16.1 file:line, under megatron/core
    reason: str
    apply: Callable[[], None]
    still_needed: Callable[[], bool]  # called without install(): does megatron-core still have the fault?


# Torch's error is "not compiled with CUDA", that of a CUDA build "found no NVIDIA driver".
_NO_DEVICE = ("cuda", "nvidia")


def _raises(probe: Callable[[], Any], *words: str) -> bool:
    """Whether the probe fails with one of these words in the error, i.e. because of the fault."""
    try:
        probe()
    except Exception as error:
        text = f"{type(error).__name__} {error}".lower()
        return any(word.lower() in text for word in words)
    return False


def _probe_mask() -> Any:
    return importlib.import_module("megatron.core.transformer.utils").get_default_causal_mask(4)


def _probe_rng_setter() -> bool:
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    before = torch.get_rng_state()
    torch.rand(1)
    module._set_cuda_rng_state(before)
    unchanged = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return unchanged


def _probe_recompute() -> Any:
    """Uses `CheckpointWithoutOutput`, as selective recompute of a norm does, without its handling of random states."""
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    return module.CheckpointWithoutOutputFunction.apply(
        lambda x: x * 2, module.CheckpointWithoutOutput(), torch.ones(2, requires_grad=True)
    )


def _probe_grad_type() -> Any:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    module = importlib.import_module("megatron.core.optimizer.clip_grads")
    return module.clip_grad_by_total_norm_fp32([parameter], 10.0, 1.0)


def _probe_cuda_method() -> Any:
    return importlib.import_module("megatron.core.full_cuda_graph").copy_tensors_in_struct(torch.ones(1))


def _probe_collective_alone() -> Any:
    module: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffer = torch.ones(2)
    return module.dist_all_gather_func(buffer, buffer, group=types.SimpleNamespace(size=lambda: 1))


def _compiled_on_import() -> bool:
    module = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    return hasattr(module.swiglu, "_torchdynamo_orig_callable")


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="jit_fuser",
        where="jit.py:21,40; fusions/*.py, transformer/utils.py decorate at import",
        reason="torch.compile on CPU needs a C++ compiler at the first step and buys nothing for a test",
        apply=_disable_jit,
        still_needed=_compiled_on_import,
    ),
    Patch(
        name="torch",
        where="see TOUCH_POINTS",
        reason="device='cuda' and torch.cuda.current_device() in tensor factories, CUDA random state, synchronize",
        apply=rebind_all,
        still_needed=lambda: _raises(_probe_mask, *_NO_DEVICE),
    ),
    Patch(
        name="rng_setter",
        where="tensor_parallel/random.py:72-111",
        reason="hands its work to torch.cuda._lazy_call, which never runs it without CUDA: fork() would not restore",
        apply=_set_rng_directly,
        still_needed=_probe_rng_setter,
    ),
    Patch(
        name="fp8_names",
        where="tensor_parallel/random.py:589-592, 636, 684-687",
        reason="`self.fp8 = fp8 is not None` is true for the default False, so selective recompute asks for three "
        "names that only Transformer-Engine brings",
        apply=_add_fp8_names,
        still_needed=lambda: _raises(_probe_recompute, "FP8GlobalStateManager", "activation_recompute_forward"),
    ),
    Patch(
        name="tensor_types",
        where="optimizer/clip_grads.py:167; distrib_optimizer.py:361,420,582; optimizer.py:671,690",
        reason="asks for 'torch.cuda.FloatTensor' by name; a host tensor fails, or is left out of the optimizer",
        apply=_name_host_types,
        still_needed=lambda: _raises(_probe_grad_type, "AssertionError"),
    ),
    Patch(
        name="tensor_cuda",
        where="tensor_parallel/data.py:84; models/common/language_module/language_module.py:244; "
        "models/common/embeddings/rope_utils.py:64; dist_checkpointing/exchange_utils.py:336,499; optimizer.py:375",
        reason="tensor.cuda(), a method, is out of the proxy's reach; only calls from megatron-core are answered",
        apply=_cuda_method_stays_on_host,
        still_needed=lambda: _raises(_probe_cuda_method, *_NO_DEVICE),
    ),
    Patch(
        name="alone",
        where="distributed/param_and_grad_buffer.py:285,443",
        reason="with one rank gloo copies all gradients and parameters through scratch memory: 0.5 s of a step of 79 M "
        "parameters, of which the update itself takes 0.1 s",
        apply=_skip_collectives_of_one_rank,
        # If the collective is called, it fails because of the probe's group.
        still_needed=lambda: _raises(_probe_collective_alone, "group", "init", "namespace"),
    ),
)


def install() -> None:
    """Make megatron-core run on CPU. Call it once per process, before megatron-core is used; later calls do nothing.

    A no-op if CUDA is available.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    # megatron-core uses Transformer-Engine if it can be imported, and would pass host tensors to its FusedAdam. If
    # cuDNN is missing, the import raises RuntimeError, and megatron-core catches ImportError only.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    for name in MODULES:
        importlib.import_module(name)
    for patch in PATCHES:
        patch.apply()
    _installed = True
