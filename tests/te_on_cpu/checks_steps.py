"""A training step over Transformer-Engine's Python: reads on the host, user buffers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmscale.bench.gpu_kernels import RECIPES
from mmscale.config import Config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import assembly
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import unwrapped
from mmscale.train.steps.batch import to_device
from tests.device_reads import DeviceReads
from tests.distributed.layouts import config
from tests.distributed.test_resume import start
from tests.support import run_ranks
from tests.te_on_cpu.over_te import can_run, small, using  # noqa: F401  a fixture

# Places where a step may read; tests/unit/train/test_device_reads.py has those of the torch backend.
ALLOWED = {
    ("mmscale.train.optim.optimizer:measure", "cpu"),
    ("mmscale.train.optim.optimizer:measure", "_local_scalar_dense"),
    ("mmscale.train.steps.step:mean_losses", "_local_scalar_dense"),
    ("megatron.core.tensor_parallel.random:fork", "_local_scalar_dense"),
}


@pytest.mark.parametrize("recipe", ["off", *RECIPES])
def test_a_step_reads_once(recipe: str) -> None:
    """For norm and losses, from the second step on: nothing of Transformer-Engine's layers, FP8 state or Adam reads."""

    def one(ranks: RankEnv) -> None:
        start(ranks)
        settings = using(small(config("moma_depth", dtype="bf16"), num_layers=2), "te", fp8=recipe)
        made = assembly.build(settings, process_groups.initialize_layout())
        mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5})
        for step in range(2):
            batches = [to_device(mixture.micro_batch(2 * step + number), mixture.vocabulary) for number in range(2)]
            with DeviceReads() as reads:
                made.stepper.train(batches, lr=1e-3)
        assert not reads.found.keys() - ALLOWED, reads.found
        assert reads.found["mmscale.train.optim.optimizer:measure", "cpu"] == 1

    run_ranks(one, world_size=1)


def _over_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with gloo instead of the backend that is asked for."""
    return lambda *args, backend=None, **options: function(*args, backend="gloo", **options)


class _Buffer:
    """Replaces Transformer-Engine's communicators and only has their kind."""

    def __init__(self, shape: list[int], dtype: torch.dtype, *_: Any, **__: Any) -> None:
        self.shape, self.dtype = shape, dtype


def _with_user_buffers(precision: dict[str, Any], key_value_heads: int | None, cp: int) -> Config:
    parallel = {"tp": 2, "cp": cp, "overlap_tensor": True}
    made = config("dense", dtype="bf16", parallel=parallel, data={"document_multiple": 8})
    made = small(made, num_layers=2, num_query_groups=key_value_heads)
    return Config.model_validate(using(made, "te", **precision).model_dump())


# The suffix of the name of a linear's buffer, and the attribute that says whether it is used.
_ASKS = {
    "fprop": ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop"),
    "dgrad": ("ub_overlap_ag_dgrad", "ub_overlap_rs_dgrad", "ub_bulk_dgrad"),
    "wgrad": ("ub_bulk_wgrad",),
}


@pytest.mark.parametrize(
    ("precision", "key_value_heads", "cp"),
    [
        ({"fp8": "off"}, None, 1),
        ({"fp8": "off"}, None, 2),
        ({"fp8": "tensorwise"}, None, 1),
        ({"fp8": "delayed"}, None, 1),
        ({"fp8": "tensorwise", "fp8_skip_first": 1}, None, 1),
        ({"fp8": "tensorwise", "fp8_skip_first": 1}, None, 2),
        ({"fp8": "tensorwise", "fp8_skip_last": 1}, None, 1),
        # Both ranks share one head. megatron-core gathers the outputs of the product for it; the buffers hold the
        # residual stream, whatever the number of heads.
        ({"fp8": "off"}, 1, 1),
        ({"fp8": "tensorwise", "fp8_skip_first": 1}, 1, 1),
    ],
    ids=str,
)
def test_every_user_buffer_that_a_layer_asks_for_is_there(
    precision: dict[str, Any], key_value_heads: int | None, cp: int
) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        compiled: Any = importlib.import_module("transformer_engine_torch")
        compiled.device_supports_multicast = lambda: True
        compiled.ubuf_built_with_mpi = lambda: False
        compiled.get_stream_priority_range = lambda: (0, -5)
        compiled.CommOverlapHelper = lambda *_: None
        compiled.CommOverlap = compiled.CommOverlapP2P = _Buffer
        for name in ("new_group", "new_subgroups_by_enumeration"):  # one tensor-parallel group, or several
            setattr(torch.distributed, name, _over_gloo(getattr(torch.distributed, name)))
        torch.distributed.is_backend_available = lambda backend: True
        settings = _with_user_buffers(precision, key_value_heads, cp)
        groups = assembly.start(settings, ranks)
        model = unwrapped(assembly.build(settings, groups).chunks[0])
        base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
        first, last = settings.precision.fp8_skip_first, settings.precision.fp8_skip_last
        asked = 0
        for number, layer in enumerate(model.decoder.layers):
            quantised = precision["fp8"] != "off" and first <= number < len(model.decoder.layers) - last
            for module in layer.modules():
                for end, names in _ASKS.items():
                    if any(getattr(module, name, False) for name in names):
                        buffer = base.get_ub(f"{module.ub_name}_{end}", quantised)
                        assert buffer.shape == [2 * 64 // cp, 64]  # the residual stream of a context-parallel rank
                        asked += 1
        assert asked >= 2 * 4
        heads = 4 + 2 * (key_value_heads or 4)
        assert model.decoder.layers[0].self_attention.linear_qkv.weight.shape == (heads * 16 // 2, 64)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2 * cp)
