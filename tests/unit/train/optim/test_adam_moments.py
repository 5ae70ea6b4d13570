"""FP8 moments against COAT's formulas written out for one number at a time; hard groups; bytes that are kept."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from torch import Tensor

from mmscale.errors import ConfigError
from mmscale.train.optim.adam import HostFusedAdam
from mmscale.train.optim.adam_compact import MOMENTS, CompactAdam, ShardPlace, read, write
from mmscale.train.optim.adam_moments import GROUP, from_groups, pack, to_groups, unpack
from mmscale.train.optim.optimizer import precision_aware

# All magnitudes of E4M3 by their definition: 4 bits of exponent with bias 7, 3 of mantissa, one NaN.
E4M3 = [
    (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    for exponent in range(16)
    for mantissa in range(8)
][:-1]


def slow(group: list[float], *, keep_positive: bool) -> list[float]:
    """What a group is after being stored and read: the paper's formulas in fp64, the nearest code by search."""
    magnitudes = [abs(value) for value in group if value != 0.0]
    if not magnitudes:
        return [0.0] * len(group)
    largest = max(magnitudes)
    octaves_most = math.log2(448**2 / 2)
    smallest = max(min(magnitudes), largest * 2.0 ** (-octaves_most / 0.25))
    ratio = math.log2(largest / smallest)
    exponent = 16.0 if ratio == 0 else math.floor(octaves_most / ratio * 16) / 16
    exponent = min(max(exponent, 0.25), 16.0)
    middle = math.sqrt(largest * smallest)
    scale = 448 / (largest / middle) ** exponent
    found = []
    for value in group:
        expanded = (abs(value) / middle) ** exponent * scale
        code = min(range(len(E4M3)), key=lambda number: abs(E4M3[number] - expanded))
        if keep_positive and value > 0 and code == 0:
            code = 1
        found.append(math.copysign((E4M3[code] / scale) ** (1 / exponent) * middle, value))
    return found


def stored(values: Tensor, *, keep_positive: bool = False) -> Tensor:
    return unpack(*pack(values, keep_positive=keep_positive))


GROUPS: dict[str, Tensor] = {
    "normal": torch.randn(128, generator=torch.Generator().manual_seed(0)) * 1e-3,
    "second moments": torch.randn(128, generator=torch.Generator().manual_seed(1)).square() * 1e-9 + 1e-10,
    "zeros": torch.zeros(128),
    "one value": torch.cat((torch.zeros(127), torch.tensor([3e-7]))),
    "all equal": torch.full((128,), 2.5e-4),
    "two values, next to each other": torch.cat((torch.full((64,), 1.0), torch.full((64,), 1.0000001))),
    "one tiny value": torch.cat((torch.linspace(1e-3, 2e-3, 127), torch.tensor([1e-12]))),
    "hopeless range": torch.cat((torch.linspace(1e-3, 2e-3, 127), torch.tensor([1e-38]))),
    "denormal": torch.cat((torch.full((127,), 1e-20), torch.tensor([1e-44]))),
    "huge": torch.cat((torch.full((127,), 3e38), torch.tensor([1.0]))),
}


@pytest.mark.parametrize("keep_positive", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_equals_the_formulas(name: str, keep_positive: bool) -> None:
    group = GROUPS[name].abs() if keep_positive else GROUPS[name]
    found = stored(group.view(1, -1), keep_positive=keep_positive)[0]
    expected = torch.tensor(slow(group.tolist(), keep_positive=keep_positive))
    # A value in the middle between two codes may go either way: fp32 against fp64. None of these does.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0.0)
    assert torch.isfinite(found).all()


def test_expansion_is_what_makes_it_good() -> None:
    """Second moments as COAT found them, a range of ten in a group: plain E4M3 errs eight times as much."""
    values = torch.rand(64, GROUP, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1
    expanded = (stored(values, keep_positive=True) / values - 1).abs().mean()
    scale = 448 / values.amax(dim=1, keepdim=True)
    plain = ((values * scale).to(torch.float8_e4m3fn).float() / scale / values - 1).abs().mean()
    assert expanded < 0.005 < 0.02 < plain


class TestTinyValue:
    """An expert that few tokens reach: one element of a group is many orders of magnitude below the others."""

    @pytest.mark.parametrize("tiny", [1e-6, 1e-12, 1e-20, 1e-30, 1e-45])
    def test_it_does_not_take_the_precision_of_the_others(self, tiny: float) -> None:
        values = torch.cat((torch.linspace(1e-3, 2e-3, 127), torch.tensor([tiny]))).view(1, -1)
        found = stored(values, keep_positive=True)
        assert float((found[0, :127] / values[0, :127] - 1).abs().max()) < 0.32  # 2^-4 of E4M3, to the power of 4

    @pytest.mark.parametrize("tiny", [1e-12, 1e-30, 1e-45])
    def test_no_second_moment_becomes_zero(self, tiny: float) -> None:
        """Else m / (sqrt(v) + eps) would be m / eps."""
        values = torch.cat((torch.linspace(1e-3, 2e-3, 127), torch.tensor([tiny]))).view(1, -1)
        assert float(stored(values, keep_positive=True)[0, -1]) > 0.0

    def test_updates_stay_as_large_as_adams(self) -> None:
        """Nearly all gradients of a row vanish: no update may be larger than fp32 Adam's largest."""
        moved = {}
        for make in (HostFusedAdam, lambda p, **options: CompactAdam(p, moments="fp8_coat", **options)):
            param = torch.nn.Parameter(torch.zeros(4, GROUP))
            own = make([param], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
            generator = torch.Generator().manual_seed(3)
            largest = 0.0
            for step in range(30):
                before = param.detach().clone()
                param.grad = torch.randn(4, GROUP, generator=generator) * 1e-12
                param.grad[:, 0] = 1e-2 if step % 3 == 0 else 0.0
                own.step()
                largest = max(largest, float((param.detach() - before).abs().max()))
            moved[isinstance(own, CompactAdam)] = largest
        assert moved[True] <= 1.5 * moved[False], moved


def test_zero_stays_zero_and_signs_stay() -> None:
    values = torch.tensor([[0.0, -0.0, 1e-3, -1e-3, *([5e-4] * 124)]])
    found = stored(values)
    assert torch.equal(found.sign(), values.sign())


@given(st.integers(0, 127), st.integers(0, 400))
@settings(max_examples=50, deadline=None)
def test_groups_are_cut_at_their_borders(lead: int, numel: int) -> None:
    flat = torch.arange(1, numel + 1, dtype=torch.float32)
    groups = to_groups(flat, lead)
    assert groups.shape == (-(-(lead + numel) // GROUP), GROUP)
    assert torch.equal(from_groups(groups, lead, numel), flat)
    for position in range(numel):
        assert groups[(lead + position) // GROUP, (lead + position) % GROUP] == position + 1


def _matrix(rows: int = 96, columns: int = 128, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def _train(own: CompactAdam | HostFusedAdam, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = param.detach() * 0.1 + torch.randn(param.shape, generator=generator) * 0.3
        own.step()


@pytest.mark.parametrize(("moments", "bytes_each"), [("fp8_coat", 2 + 24 / 128), ("bf16", 4.0)])
def test_bytes_per_parameter(moments: Any, bytes_each: float) -> None:
    """2.19 for both moments: what is kept is counted, not what was meant."""
    param = _matrix()
    own = CompactAdam([param], moments=moments)
    _train(own, [param], range(1))
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own.state[param].values()
    }
    assert sum(kept.values()) / param.numel() == bytes_each


@pytest.mark.parametrize("moments", ["fp8_coat", "bf16"])
def test_each_step_is_adam_on_the_stored_moments(moments: Any) -> None:
    """A reference that quantises between fp32 steps, in plain formulas; also over several pieces of a parameter."""
    param, settings_ = _matrix(), {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    own = CompactAdam([param], moments=moments, **settings_)
    weight = param.detach().clone()
    m = v = torch.zeros_like(weight)

    def kept(value: Tensor, keep_positive: bool) -> Tensor:
        if moments == "bf16":
            return value.bfloat16().float()
        return stored(value.view(-1, GROUP), keep_positive=keep_positive).view_as(value)

    for step in range(1, 6):
        _train(own, [param], range(step, step + 1))
        assert param.grad is not None
        m = 0.9 * m + 0.1 * param.grad
        v = 0.95 * v + 0.05 * param.grad.square()
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        m, v = kept(m, False), kept(v, True)
        # A moment in the middle between two codes may go either way; its neighbour is 6 % away.
        assert float((param.detach() - weight).abs().max()) < 0.2 * 1e-2
        assert float((param.detach() - weight).abs().mean()) < 1e-6
        weight = param.detach().clone()
        found = {name: read(own.state[param], name, own.place(param), 0, param.numel()) for name in MOMENTS}
        m, v = (found[name].view_as(weight) for name in MOMENTS)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [_matrix(), _matrix()]
    for number, param in enumerate(params):
        monkeypatch.setattr("mmscale.train.optim.adam_compact._PIECE_HOST", 1 << 20 if number else 256)
        own = CompactAdam([param], moments="fp8_coat")
        own.places[param] = ShardPlace.at(40, "fp8_coat")
        _train(own, [param], range(4))
    torch.testing.assert_close(params[0], params[1])  # the last elements of a piece are summed without fused steps


def test_stays_near_fp32_moments() -> None:
    ends = {}
    for moments in (None, "bf16", "fp8_coat"):
        param = _matrix()
        own = CompactAdam([param], moments=moments, lr=1e-2) if moments else HostFusedAdam([param], lr=1e-2)  # type: ignore[arg-type]
        _train(own, [param], range(100))
        ends[moments] = param.detach().clone()
    travelled = float((ends[None] - _matrix().detach()).norm())
    for moments, limit in (("bf16", 0.01), ("fp8_coat", 0.05)):
        assert float((ends[moments] - ends[None]).norm()) < limit * travelled


@pytest.mark.parametrize("moments", ["fp8_coat", "bf16"])
def test_goes_on_exactly_after_a_reload(moments: Any) -> None:
    params = [_matrix(), torch.nn.Parameter(torch.ones(64))]
    own = CompactAdam(params, moments=moments, lr=1e-2)
    _train(own, params, range(5))
    saved = copy.deepcopy(own.state_dict())
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = CompactAdam(again, moments=moments, lr=1e-2)
    resumed.load_state_dict(saved)
    for name, (dtype, shape) in resumed.layout(again[0]).items():
        assert resumed.state[again[0]][name].dtype is dtype and tuple(resumed.state[again[0]][name].shape) == shape
    _train(own, params, range(5, 8))
    _train(resumed, again, range(5, 8))
    assert all(torch.equal(one, other) for one, other in zip(params, again, strict=True))
    assert resumed.state[again[1]]["exp_avg"].dtype is torch.float32  # a vector


def test_second_moments_decay_in_bf16() -> None:
    """Up to the beta2 that the configuration allows; above it nothing is taken off."""
    ends = {}
    for beta2 in (0.995, 0.999):
        param = torch.nn.Parameter(torch.zeros(2, 64))
        own = CompactAdam([param], moments="bf16", betas=(0.9, beta2))
        for step in range(300):
            param.grad = torch.full((2, 64), 1.0 if step == 0 else 0.0)
            own.step()
        ends[beta2] = float(own.state[param]["exp_avg_sq"].float().max() / (1 - beta2))
    assert ends[0.995] < 0.5 and ends[0.999] > 0.99


def test_writes_where_it_reads() -> None:
    place = ShardPlace.at(200, "fp8_coat")
    param = torch.nn.Parameter(torch.zeros(500))
    own = CompactAdam([param], moments="fp8_coat")
    own.places[param] = place
    own.initialize()
    values = torch.randn(500, generator=torch.Generator().manual_seed(5))
    write(own.state[param], "exp_avg", place, 0, values)
    whole = read(own.state[param], "exp_avg", place, 0, 500)
    assert float((whole - values).abs().max()) < 0.2
    assert torch.equal(read(own.state[param], "exp_avg", place, 56, 300), whole[56:300])


class TestTransformerEngine:
    """Moments that its FusedAdam keeps: megatron-core's settings, and a clear error where there is none."""

    @pytest.mark.parametrize("moments", ["te_bf16", "te_fp8"])
    def test_without_it_is_an_error(self, moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", False)
        with pytest.raises(ConfigError, match=f"optim.moments = {moments} needs Transformer-Engine") as error:
            precision_aware(moments)
        assert "fp8_coat" in error.value.remedy

    def test_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The names are fields of megatron-core's settings, the types those that FusedAdam takes."""
        monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        names = {field.name for field in dataclasses.fields(OptimizerConfig)}
        for moments, dtype in (("te_bf16", torch.bfloat16), ("te_fp8", torch.uint8)):
            found = precision_aware(moments)
            assert found.keys() <= names
            assert found["use_precision_aware_optimizer"] is True
            assert found["exp_avg_dtype"] is found["exp_avg_sq_dtype"] is dtype
        assert precision_aware("fp32") == precision_aware("bf16") == precision_aware("fp8_coat") == {}
