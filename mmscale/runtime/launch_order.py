"""Sets the number of CUDA hardware queues and creates user buffers, which overlapped communication needs.

Both must be done before the model is created: the first before CUDA is initialised, the second after groups exist.
"""

from __future__ import annotations

import importlib
import logging
import os

from mmscale.runtime import transformer_engine

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_log = logging.getLogger(__name__)


def one_queue(*, tp: int) -> None:
    """Make kernels start in launch order, which tensor-parallel overlap relies on.

    In backward megatron-core launches a collective and then the product that it overlaps with
    (tensor_parallel/layers.py). With several queues the product may start first and occupy the whole device, so that
    the collective waits for it. Without tensor parallelism nothing relies on the order, and several queues let the
    exchange of tokens, data-parallel messages and products overlap; then the variable is not changed.

    It does not check for a device, because that may initialise CUDA, and a host ignores the variable. Another number
    set by the user is kept, with a warning.

    Args:
        tp: tensor-parallel ranks.
    """
    if tp > 1 and os.environ.setdefault(QUEUES, "1") != "1":
        _log.warning(
            "%s=%s: tensor-parallel messages may not overlap with products (parallel.tp = %d); unset it or set it to 1",
            QUEUES,
            os.environ[QUEUES],
            tp,
        )


def user_buffers(*, rows: int, hidden: int, tp: int, fp8: bool, bf16: bool) -> None:
    """Create the buffers through which Transformer-Engine's linears overlap tensor-parallel messages with products.

    They have one shape, so every layer must send the same number of rows. A linear uses the buffers of its own number
    format, so both kinds are created if some layers are in FP8 and others are not. Every rank of every tensor-parallel
    group calls it.

    Args:
        rows: tokens of a micro-batch on a context-parallel rank, over all of its tensor-parallel ranks.
        hidden: width of the residual stream.
        tp: tensor-parallel ranks.
        fp8: whether there are layers in FP8.
        bf16: whether there are layers in bf16.

    Raises:
        ConfigError: Transformer-Engine cannot run here.
    """
    transformer_engine.require("parallel.overlap_tensor = true")
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    kinds = base.UserBufferQuantizationMode
    modes = [mode for mode, used in ((kinds.FP8, fp8), (kinds.NONE, bf16)) if used]
    base.initialize_ub(shape=[rows, hidden], tp_size=tp, quantization_modes=modes, bootstrap_backend="nccl")
