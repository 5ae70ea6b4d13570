"""Initial weights: reproducible, the same under any cut, with the right spread, and every parameter of them drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from mmscale.config import Config, ExpertsConfig, ModalityVocab, VocabConfig
from mmscale.model import init
from tests.unit.model.reference import depth, moma_experts, tiny

OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "w2")
CONFIGS = {
    "dense": tiny("dense", norm="post"),
    "moe": tiny("moe"),
    "everything": tiny(norm="post_per_expert", depth=depth(), experts=moma_experts(shared=1)),
    "tied": tiny(tie_embeddings=True),
    "biased": tiny("dense", qkv_bias=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_twice_and_different_by_seed(name: str, build: Callable[..., GPTModel]) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    first = dict(build(config, randomised=False).named_parameters())
    torch.manual_seed(1)
    second = dict(build(config, randomised=False).named_parameters())
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    third = dict(build(other, randomised=False).named_parameters())
    assert first.keys() == second.keys()
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
        assert ("norm" in key or key.endswith(".bias")) == torch.equal(weight, third[key]), key


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_spread(dtype: str, build: Callable[..., GPTModel]) -> None:
    """Projections into the residual stream are smaller by sqrt(2 * layers); norms are one."""
    for kind in ("dense", "moma"):
        experts = moma_experts(shared=1) if kind == "moma" else None
        config = tiny(
            kind, hidden_size=64, ffn_hidden_size=96, num_layers=4, init_std=0.05, dtype=dtype, experts=experts
        )
        for name, weight in build(config, randomised=False).named_parameters():
            values = weight.detach().double()
            if "norm" in name:
                assert torch.all(values == 1.0), name
                continue
            std = 0.05 / math.sqrt(8) if name.endswith(OUTPUTS) else 0.05
            # Five standard errors of a normal sample's deviation and mean.
            assert float(values.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), name
            assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel()), name


def test_no_two_parameters_are_equal(build: Callable[..., GPTModel]) -> None:
    """Layers, groups and experts are drawn by themselves; so are the two halves of a SwiGLU."""
    for config in (CONFIGS["everything"], CONFIGS["dense"]):
        rows: dict[tuple[float, ...], str] = {}
        for name, weight in build(config, randomised=False).named_parameters():
            if "norm" in name:
                continue
            for number, row in enumerate(weight.detach().reshape(weight.shape[0], -1)):
                key = tuple(row[:12].tolist())
                if len(key) > 1:
                    assert key not in rows, f"{name}[{number}] equals {rows[key]}"
                    rows[key] = f"{name}[{number}]"
        assert len(rows) > 100


def modalities(*names: str) -> VocabConfig:
    return VocabConfig(modalities=tuple(ModalityVocab(name=name, size=16) for name in names), pad_multiple=8)


def test_a_modality_may_be_called_normals(build: Callable[..., GPTModel]) -> None:
    """Which parameters are norms is not read off their names."""
    base = tiny(norm="post_per_expert")
    experts = ExpertsConfig(counts={"text": 1, "normals": 2}, share={"text": 0.5, "normals": 0.5})
    config = Config.model_validate(
        base.model_copy(
            update={
                "vocab": modalities("text", "normals"),
                "model": base.model.model_copy(update={"experts": experts}),
            }
        ).model_dump()
    )
    weights = dict(build(config, randomised=False).named_parameters())
    for kind in ("router.normals", "experts.normals.w1", "experts.normals.w2"):
        first, second = (weights[f"decoder.layers.{layer}.mlp.{kind}"].detach() for layer in (0, 1))
        assert not torch.equal(first, second)
        assert 0.005 < float(first.std()) < 0.05
    assert torch.all(weights["decoder.layers.0.mlp.expert_norm.normals.weight"] == 1.0)


class Forgetful(nn.Module):
    """A module whose sharded_state_dict leaves a parameter out."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.first, self.second, self.kept = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2)), kept

    def sharded_state_dict(self, metadata: dict[str, bool]) -> dict[str, ShardedTensor]:
        assert metadata == {"non_homogeneous_layers": True}
        return {self.kept: ShardedTensor.from_rank_offsets(self.kept, getattr(self, self.kept).detach())}


def test_a_forgotten_parameter_is_a_bug(process_groups: ProcessGroupCollection) -> None:
    with pytest.raises(AssertionError, match=r"second was not initialised"):
        init.initialize(Forgetful("first"), seed=1, std=0.02, num_layers=1)


# --- any cut of a tensor gives the same numbers -----------------------------------------------------------------------


def filled(
    shape: tuple[int, ...], *, key: str = "weight", seed: int = 1, cuts: tuple[tuple[int, int, int], ...] = ()
) -> Tensor:
    """The shard of a global tensor of `shape` that `cuts` (axis, rank, ranks) leave."""
    local = list(shape)
    for axis, _, ranks in cuts:
        local[axis] //= ranks
    data = torch.full(local, float("nan"))
    init._fill(ShardedTensor.from_rank_offsets(key, data, *cuts), seed=seed, std=1.0)
    return data


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    block=st.integers(1, 40),
)
def test_shards_are_slices_of_the_whole(sizes: list[int], ranks: list[int], block: int) -> None:
    """For any number of rows in a block: cuts do not have to meet the blocks' borders."""
    shape = tuple(size * rank for size, rank in zip(sizes, ranks, strict=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "_BLOCK_ELEMENTS", block)
        whole = filled(shape)
        assert torch.isfinite(whole).all()
        for axis in range(len(shape)):
            parts = [filled(shape, cuts=((axis, rank, ranks[axis]),)) for rank in range(ranks[axis])]
            assert torch.equal(torch.cat(parts, dim=axis), whole)
        if len(shape) > 1:
            last = (len(shape) - 1, ranks[len(shape) - 1] - 1, ranks[len(shape) - 1])
            both = filled(shape, cuts=((0, ranks[0] - 1, ranks[0]), last))
            assert torch.equal(both, whole[-sizes[0] :, ..., -sizes[-1] :])


def test_blocks_are_drawn_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: blocks differ from each other, and so do keys and seeds."""
    monkeypatch.setattr(init, "_BLOCK_ELEMENTS", 8)
    whole = filled((8, 4))  # blocks of two rows
    assert len({float(value) for value in whole[::2, 0]}) == 4
    assert not torch.equal(whole, filled((8, 4), key="other"))
    assert not torch.equal(whole, filled((8, 4), seed=2))


def test_a_view_is_filled_in_place() -> None:
    """The halves of a SwiGLU weight come as views of one parameter, and in bf16 they are rounded, not redrawn."""
    whole = filled((4, 6))
    parameter = torch.zeros(4, 8, dtype=torch.bfloat16)
    init._fill(ShardedTensor.from_rank_offsets("weight", parameter[:, 1:7]), seed=1, std=1.0)
    assert torch.equal(parameter[:, 1:7], whole.bfloat16())
    assert torch.all(parameter[:, ::7] == 0.0)
