"""HostFusedAdam: the arithmetic of torch's AdamW in the state layout of FusedAdam."""

import copy
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from mmscale.train.optim import adam
from mmscale.train.optim.adam import HostFusedAdam

SHAPES = ((7, 5), (11,), (3, 2, 4), ())


def _params(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _give_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 3.0


def _groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 1e-2}]


@pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_torch(adam_w_mode: bool, reference: type[torch.optim.Optimizer]) -> None:
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = _params(), _params()
    own = HostFusedAdam(_groups(ours), adam_w_mode=adam_w_mode, **settings)
    other = reference(_groups(theirs), **settings)  # type: ignore[call-arg]
    for step in range(20):
        _give_gradients(ours, step)
        _give_gradients(theirs, step)
        own.step()
        other.step()
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_without_bias_correction_the_first_step_is_larger() -> None:
    moved = {}
    for correct in (True, False):
        param = torch.nn.Parameter(torch.zeros(1))
        param.grad = torch.ones(1)
        HostFusedAdam([param], lr=1.0, betas=(0.9, 0.99), bias_correction=correct).step()
        moved[correct] = float(param)
    assert moved[True] == pytest.approx(-1.0, rel=1e-5)
    assert moved[False] == pytest.approx(-0.1 / 0.1, rel=1e-5)  # (1 - beta1) / sqrt(1 - beta2)


def test_state_layout_is_that_of_fused_adam() -> None:
    params = _params()
    own = HostFusedAdam(params)
    assert "step" not in own.param_groups[0]  # FusedAdam starts to count with the first step
    _give_gradients(params, 0)
    own.step()
    state = own.state_dict()
    assert state["param_groups"][0]["step"] == 1
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())


def test_goes_on_exactly_after_a_reload() -> None:
    params = _params()
    own = HostFusedAdam(params, lr=1e-2, weight_decay=0.1)
    for step in range(7):
        _give_gradients(params, step)
        own.step()
    saved, weights = copy.deepcopy(own.state_dict()), [param.detach().clone() for param in params]

    resumed_params = [torch.nn.Parameter(weight) for weight in weights]
    resumed = HostFusedAdam(resumed_params, lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(saved)
    for step in range(7, 10):
        for trained, optimizer in ((params, own), (resumed_params, resumed)):
            _give_gradients(trained, step)
            optimizer.step()
    assert resumed.param_groups[0]["step"] == 10  # and not 7 + one per parameter
    for mine, expected in zip(resumed_params, params, strict=True):
        assert torch.equal(mine, expected)


def test_parameters_without_gradient_and_empty_groups_are_left_alone() -> None:
    params = _params()
    before = params[1].detach().clone()
    own = HostFusedAdam([{"params": params}, {"params": []}], weight_decay=0.1)
    _give_gradients(params, 0)
    params[1].grad = None
    own.step()
    assert torch.equal(params[1], before)
    assert params[1] not in own.state
    assert "step" not in own.param_groups[1]


def test_empty_shards_are_fine() -> None:
    # The distributed optimizer gives a rank an empty shard where parameters are few.
    param = torch.nn.Parameter(torch.empty(0))
    param.grad = torch.empty(0)
    HostFusedAdam([param], weight_decay=0.1).step()


def test_closure_runs_with_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    own = HostFusedAdam([param], lr=0.1)

    def closure() -> float:
        own.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return float(loss)

    assert own.step(closure) == 1.0
    assert float(param) == pytest.approx(0.9, rel=1e-5)


def test_install_makes_megatron_use_it() -> None:
    if not adam.install():
        pytest.skip("Transformer-Engine or apex brings a FusedAdam here")
    assert adam.install()  # again changes nothing
    assert megatron_optimizer.Adam is HostFusedAdam
    assert distrib_optimizer.Adam is HostFusedAdam
    assert megatron_optimizer.USING_PYTORCH_OPTIMIZER is False
    assert distrib_optimizer.HAVE_APEX_OR_TE is True
    assert distrib_optimizer.USING_APEX_OPTIMIZER is True
