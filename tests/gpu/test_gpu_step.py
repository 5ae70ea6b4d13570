"""On a GPU: how often a training step waits for the device, and captured experts against plain ones."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch

from mmscale.config import Config
from mmscale.model.build import transformer_config
from mmscale.model.expert_compute import ExpertCompute, Products
from mmscale.model.experts import Experts
from mmscale.model.mixed_modal import RoutingStats
from mmscale.runtime import device, groups
from mmscale.train.assembly import TrainingParts, build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import Batch, to_device
from tests.distributed.layouts import config

MODELS = ["dense", "moe", "moma_post_per_expert_shared", "moma_depth", "moma_depth_joint"]


def started(settings: Config) -> tuple[TrainingParts, list[list[Batch]]]:
    """A model after one step, and the batches of two more."""
    parts = build(settings, groups.collection())
    mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5})
    batches = [
        [to_device(mixture.micro_batch(4 * step + n), mixture.vocabulary, stats=RoutingStats()) for n in range(4)]
        for step in range(3)
    ]
    assert parts.stepper.train(batches[0], lr=1e-3).applied
    torch.cuda.synchronize()
    return parts, batches[1:]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("model", MODELS)
def test_forward_and_backward_do_not_wait(model: str) -> None:
    parts, (batches, _) = started(config(model, dtype="bf16"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts.stepper.accumulate(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_once(model: str) -> None:
    """For norm and losses; auxiliary routers of a joint run are judged by themselves."""
    settings = config(model, dtype="bf16")
    parts, (batches, _) = started(settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            parts.stepper.train(batches, lr=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.filename) + f":{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= (2 if settings.model.auxiliary.mode == "joint" else 1), waits


@pytest.mark.usefixtures("one_rank")
def test_a_timer_times_its_own_stream_and_the_host_and_waits_for_neither() -> None:
    """A reduction on another stream is no part of a rank's own time; its loader, which leaves the queue empty, is."""
    cycles = 200_000_000  # about 0.1 s

    def timed(*, beside: bool, host_s: float) -> float:
        timer, other = device.Timer(), torch.cuda.Stream()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            timer.begin()
            time.sleep(host_s)
            if beside:
                with torch.cuda.stream(other):
                    torch.cuda._sleep(10 * cycles)
            torch.cuda._sleep(cycles)
            timer.end()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        seconds = timer.seconds()
        assert seconds is not None
        return seconds

    alone = timed(beside=False, host_s=0.0)
    assert alone > 0.02
    assert timed(beside=True, host_s=0.0) < 2.0 * alone
    assert timed(beside=False, host_s=0.3) > 0.3 + 0.5 * alone


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("products", [Products.BMM, Products.GROUPED_MM])
def test_captured_experts_are_the_plain_ones(products: Products) -> None:
    """Over several calls, also after the weights have changed in place, and for another number of rows."""
    settings = config("moma", dtype="bf16")
    pair = []
    for graph in (False, True):
        compute = ExpertCompute(products, fused=True, graph=graph)
        experts = Experts(
            transformer_config(settings), count=4, width=64, groups=groups.collection(), own=range(4), compute=compute
        ).cuda()
        generator = torch.Generator().manual_seed(3)
        for parameter in experts.parameters():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        pair.append(experts)
    for call, rows in enumerate((64, 64, 32, 64)):
        generator = torch.Generator().manual_seed(call)
        tokens = torch.randn(4, rows, 64, generator=generator).cuda().bfloat16()
        found: list[Any] = []
        for experts in pair:
            given = tokens.clone().requires_grad_()
            output = experts(given)
            found.append([output, *torch.autograd.grad(output, (given, *experts.parameters()), tokens)])
            for parameter in experts.parameters():
                parameter.data.mul_(1.01)
        for plain, captured in zip(*found, strict=True):
            torch.testing.assert_close(captured, plain, rtol=0.0, atol=0.0)
