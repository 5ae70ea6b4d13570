"""A whole optimizer step, measured and logged, waits for the device once: for its one reduction of norm and losses.

What hooks fetch after a logged step is counted by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.data.stream.loader import StepBatch
from mmscale.model.attention import DocumentAttention
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.log.layers_log import LayersHook
from mmscale.train.log.stragglers import RankTimes
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.batch import part_of, to_device
from mmscale.train.steps.step_report import StepReport, routing_stats
from tests.device_reads import DeviceReads
from tests.distributed.layouts import config
from tests.support import run_ranks

# Where a step may read, and why.
ALLOWED = {
    (
        "mmscale.train.optim.optimizer:measure",
        "cpu",
    ): "the wait of a step: norm and losses, without which it cannot be judged",
    ("mmscale.train.optim.optimizer:measure", "_local_scalar_dense"): "numbers of what has just come to the host",
    ("mmscale.train.steps.step:mean_losses", "_local_scalar_dense"): "the same",
    ("mmscale.train.steps.auxiliary_routers:measure", "tolist"): "the same",
    ("megatron.core.tensor_parallel.random:fork", "_local_scalar_dense"): "of the host generator's state",
}
# What hooks may fetch after a logged step; after any other step, nothing.
LOGGED = {
    ("mmscale.train.log.layers_log:_summed", "cpu"): "counts of all layers, at once",
    ("mmscale.train.log.layers_log:_summed", "numpy"): "of what has just come to the host",
    **{
        ("mmscale.runtime.groups:gathered", what): "counts of all pipeline stages, as an object"
        for what in ("cpu", "numpy", "_local_scalar_dense")
    },
    ("mmscale.train.log.stragglers:on_step", "upload"): "this rank's time",
    ("mmscale.train.log.stragglers:on_step", "tolist"): "all ranks' times",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"dtype": "bf16"}),
    "moe, gathered and reduced in between": (
        "moe",
        {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "noise, shared experts, tp": ("moma_post_per_expert_shared", {"parallel": {"tp": 2}}),
    "depth by modality, pp": ("moma_depth_per_modality", {"parallel": {"pp": 2, "recompute": "full"}}),
    "auxiliary routers, cut-offs, ep": (
        "moma_depth_joint",
        {"dtype": "bf16", "parallel": {"ep": 2, "overlap_experts": True}},
    ),
    "capacity by the tokens that are there, ep": ("moma_actual", {"parallel": {"ep": 2}}),
    "the same of micro-batches, tp": ("moma_actual_micro_batch", {"parallel": {"tp": 2}}),
    "an ungated group, ep": ("moma_4t1i", {"parallel": {"ep": 2, "overlap_experts": True}}),
}


def reads_of(settings: Config) -> dict[int, tuple[DeviceReads, DeviceReads]]:
    """What the second and the third step read, which is logged, and their hooks after them.

    A step is the forward, backward, reduction and update of four micro-batches.
    """
    settings = settings.model_copy(update={"log": settings.log.model_copy(update={"every": 3, "layers_every": 1})})
    parallel = settings.parallel
    pg = groups.initialize_layout(tp=parallel.tp, pp=parallel.pp, ep=parallel.ep, seed=1)
    parts = build(settings, pg)
    mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5})
    state = TrainState(parts.chunks, parts.optimizer)
    times = RankTimes(settings, stepper=parts.stepper, state=state, begun=lambda step: None)
    hooks = [times, LayersHook(settings, groups=pg, metrics=None)]
    found = {}
    parted = [list(part_of(pg).batch(mixture, first, 4)) for first in (0, 4, 8)]
    batches = times.watch(StepBatch(tuple(mine), (0, 0), (0, 0), 0) for mine in parted)
    for step in (1, 2, 3):
        stats = routing_stats(settings, step)
        with DeviceReads() as reads:
            batch = next(batches)
        uploaded = [to_device(part, mixture.vocabulary, stats=stats) for part in batch.micro_batches]
        with reads:
            result = parts.stepper.train(uploaded, lr=1e-3)
        assert result.applied
        state.step = step
        report = StepReport(step=step, batch=batch, result=result, lr=1e-3, stats=stats)
        with DeviceReads() as after:
            for hook in hooks:
                hook.on_step(state, report)
        assert stats is None or settings.model.kind == "dense" or (stats.read() and stats.counts)
        found[step] = reads, after
    assert times.figures()["rank_time_median_s"] > 0.0
    groups.destroy_layout()
    return {step: found[step] for step in (2, 3)}


SMALL_MOMENTS = "moments in FP8"
# In `make test`: each kind of routing, and parallelism of every kind.
SHORT = ("dense", "noise, shared experts, tp", "depth by modality, pp", "auxiliary routers, cut-offs, ep")
LONG = (*(name for name in CASES if name not in SHORT), SMALL_MOMENTS)


@pytest.mark.parametrize("names", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["", "more"])
def test_a_step_reads_once(names: tuple[str, ...]) -> None:
    def steps(ranks: RankEnv) -> None:
        # The device's attention takes a mask; by documents, whose lengths it reads, it goes on hosts only.
        DocumentAttention.forward = _as_on_a_device  # type: ignore[method-assign]
        groups.start(ranks)
        settings = {name: config(model, **options) for name, (model, options) in CASES.items()}
        settings[SMALL_MOMENTS] = _with_small_moments(settings["dense"])
        for name in names:
            own = settings[name]
            joint = own.model.auxiliary.mode == "joint"  # auxiliary routers are judged by themselves
            for step, (reads, after) in reads_of(own).items():
                found = reads.found
                assert not found.keys() - ALLOWED.keys(), f"{name}, step {step}: {found}"
                assert found["mmscale.train.optim.optimizer:measure", "cpu"] == (2 if joint else 1), f"{name}: {found}"
                fetched = after.found
                assert not fetched.keys() - (LOGGED.keys() if step == 3 else set()), f"{name}, step {step}: {fetched}"
                for place in ("log.layers_log:_summed", "cpu"), ("log.stragglers:on_step", "tolist"):
                    times = fetched[f"mmscale.train.{place[0]}", place[1]]
                    assert times == (step == 3), f"{name}, step {step}: {fetched}"
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=600)


def _with_small_moments(settings: Config) -> Config:
    return settings.model_copy(update={"optim": settings.optim.model_copy(update={"moments": "fp8_coat"})})


def _as_on_a_device(
    self: DocumentAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **facts: Any
) -> Tensor:
    bias = facts["packed_seq_params"].attention_bias(query.dtype)
    return self._masked(query, key, value, bias)


class _Reader(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * gradients[0].sum().item()


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "mask": lambda x: x[x > 0],
    "write through a mask": lambda x: x.detach().index_put_((x > 0,), torch.zeros(2)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(torch.tensor([1, 2, 0])),
    "synchronize": lambda x: device.synchronize(),
    "upload": lambda x: x.new_tensor([1.0, 2.0]),
    "upload of a new one": lambda x: torch.tensor(3.0, device=x.device),
    "backward": lambda x: _Reader.apply(x.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", READS)
def test_every_kind_of_read_is_seen(name: str) -> None:
    with DeviceReads() as reads:
        READS[name](torch.tensor([1.0, -1.0, 2.0]))
    assert reads.found.total() >= 1
    (place,) = {place for place, _ in reads.found}
    assert place.startswith(f"{__name__}:")


def test_what_stays_on_the_device_is_no_read() -> None:
    x, mask = torch.randn(4, 3, requires_grad=True), torch.tensor([True, False, True, True])
    with DeviceReads() as reads:
        chosen = x[torch.arange(2)].index_select(0, torch.zeros(2, dtype=torch.int64))
        y = torch.where(mask.unsqueeze(1), x, 0.0).masked_fill(~mask.unsqueeze(1), 1.0)
        (chosen.sum() + y.topk(2, dim=0).values.sum() / torch.full((), 2.0)).backward()
        torch.tensor(0, dtype=torch.int)
    assert not reads.found
