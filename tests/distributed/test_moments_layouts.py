"""Adam's moments in FP8 and bf16 in checkpoints: bit for bit on the same layout, as groups allow on any other.

What a checkpoint holds is compared decoded; what the copying tools make of it, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools.copying import archive, reshard, restore
from checkpoints_tools.diff import diff
from checkpoints_tools.moments import decoded
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_values import values
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.optim.adam_compact import MOMENTS, triples_of
from mmscale.train.state.train_state import TrainState
from tests.distributed.test_resume import STEPS, leg, settings, start, tensors, train
from tests.support import run_ranks

STATE = "optimizer.state."
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "wide": {"dp": {}, "tp": {"tp": 2}, "ep": {"ep": 2}},
    "narrow": {"tp": {"tp": 2}},
}


def made(model: str, moments: str, *, wide: bool = False, **options: Any) -> Config:
    """A toy with rows of 64, or one with rows of 128 and more on two tensor-parallel ranks."""
    config = settings(model, **options)
    optim = config.optim.model_copy(update={"moments": moments})
    stage = config.auxiliary.model_copy(
        update={"optim": config.auxiliary.optim.model_copy(update={"moments": moments})}
    )
    shape: dict[str, Any] = {}
    if wide:
        experts = config.model.experts.model_copy(update={"counts": {"text": 2, "image": 2}})
        shape = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 256, "experts": experts}
    update = {"optim": optim, "auxiliary": stage, "model": config.model.model_copy(update=shape)}
    return config.model_copy(update=update)


def copied(config: Config, source: Path, target: Path) -> None:
    """Load step 2 and save it again, under another layout or with other moments; every rank calls it."""
    parallel = config.parallel
    groups = process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=config.run.seed
    )
    parts = build(config, groups)
    state = TrainState(parts.chunks, parts.optimizer, routers=parts.routers)
    options: dict[str, Any] = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": lambda *_, **__: None}
    CheckpointManager(source, **options).load(state, 2)
    CheckpointManager(target, **options).save(state)
    process_groups.destroy_layout()


def kept(run: Path, step: int = 2) -> dict[str, Tensor]:
    """Every tensor, with moments decoded."""
    source = decoded(open_source(run, step))
    return {name: source.read(name) for name in source.names()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, int]:
    """How many elements of each tensor are others."""
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    found = {name: int((value != after[name]).sum()) for name, value in before.items()}
    return {name: number for name, number in found.items() if number}


# Model, moments, dtype and layout.
SAME: list[tuple[str, str, str, dict[str, Any]]] = [
    ("moma_depth_joint", "fp8_coat", "fp32", {}),
    ("moma", "bf16", "bf16", {"ep": 2}),
    ("mot", "fp8_coat", "bf16", {"tp": 2}),  # gate and up projections of each modality, shared by ranks
]
SAME_TOO: list[tuple[str, str, str, dict[str, Any]]] = [("moma", "fp8_coat", "bf16", {"tp": 2})]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SAME, marks=pytest.mark.long),
        pytest.param(SAME_TOO, marks=pytest.mark.exhaustive),
    ],
    ids=["", "rest"],
)
def test_same_layout_goes_on_exactly(tmp_path: Path, cases: list[tuple[str, str, str, dict[str, Any]]]) -> None:
    """Also with a joint run's routers, whose optimizer is another one, and with bf16 weights."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (model, moments, dtype, parallel) in enumerate(cases):
            config = made(model, moments, dtype=dtype, parallel=parallel)
            whole, halves = tmp_path / f"{number}_whole", tmp_path / f"{number}_halves"
            uninterrupted = leg(config, whole, load=None, until=STEPS)
            resumed = leg(config, halves, load=None, until=2) + leg(config, halves, load=2, until=STEPS)
            assert resumed == uninterrupted, (model, moments, parallel)
            one, other = tensors(whole, STEPS), tensors(halves, STEPS)
            assert one.keys() == other.keys()
            assert not [key for key in one if not torch.equal(one[key], other[key])], (model, moments, parallel)
            small = [key for key in one if one[key].dtype is {"fp8_coat": torch.uint8, "bf16": torch.bfloat16}[moments]]
            assert any(key.startswith(f"{STATE}exp_avg_sq.") for key in small), moments
            scales = [key for key in one if key.startswith(f"{STATE}{triples_of('exp_avg')}.")]
            assert bool(scales) == (moments == "fp8_coat")
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


@pytest.mark.long
class TestOtherLayouts:
    """One run of two data-parallel ranks, read and written again under other layouts."""

    @staticmethod
    @pytest.fixture(scope="class")
    def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("moments")

        def two(ranks: RankEnv) -> None:
            start(ranks)
            for name, layouts in LAYOUTS.items():
                leg(made("moma", "fp8_coat", wide=name == "wide"), folder / name, load=None, until=2)
                for layout, parallel in layouts.items():
                    config = made("moma", "fp8_coat", wide=name == "wide", parallel=parallel)
                    copied(config, folder / name, folder / f"{name}_{layout}")
            copied(made("moma", "fp32"), folder / "narrow", folder / "as_fp32")
            copied(made("moma", "bf16"), folder / "narrow", folder / "as_bf16")
            copied(made("moma", "fp8_coat"), folder / "as_fp32", folder / "as_fp8")
            process_groups.finalize()

        def one(ranks: RankEnv) -> None:
            start(ranks)
            for name in ("wide", "narrow"):
                copied(made("moma", "fp8_coat", wide=name == "wide"), folder / name, folder / f"{name}_one")
            leg(made("moma", "fp8_coat"), folder / "narrow_tp", load=2, until=3)
            process_groups.finalize()

        run_ranks(two, world_size=2, timeout_s=600)
        run_ranks(one, world_size=1, timeout_s=600)
        return folder

    @pytest.mark.parametrize("layout", ["dp", "tp", "ep", "one"])
    def test_rows_of_whole_groups_are_exact(self, runs: Path, layout: str) -> None:
        """At most the groups in which a rank's part began, one for each buffer, are quantised again."""
        before, after = kept(runs / "wide"), kept(runs / f"wide_{layout}")
        found = changed(before, after)
        assert not [name for name in found if not name.startswith(f"{STATE}exp_avg")], found
        assert sum(found.values()) <= (0 if layout == "dp" else 2 * 2 * 128), found

    @pytest.mark.parametrize("layout", ["tp", "one"])
    def test_other_rows_are_near(self, runs: Path, layout: str) -> None:
        """Each value within what storing it once more may change: 1/16 to the power of 1 / k, of k > 1/2 here."""
        before, after = kept(runs / "narrow"), kept(runs / f"narrow_{layout}")
        found = changed(before, after)
        assert not [name for name in found if not name.startswith(f"{STATE}exp_avg")], found
        assert found  # rows of 64, of 32 on two tensor-parallel ranks: no group of 128 is one there
        for name in found:
            scale = before[name].abs().max()
            assert float(((after[name] - before[name]).abs() / scale).max()) < 0.13, name
            big = before[name].abs() > 0.01 * scale
            assert float(((after[name] - before[name]).abs() / before[name].abs())[big].max()) < 0.13, name

    def test_moments_may_be_others_after_a_restart(self, runs: Path) -> None:
        """FP8 as fp32 is exact, and nearly so back again (it may choose another k); as bf16 it is rounded."""
        eight, full, half, again = (kept(runs / name) for name in ("narrow", "as_fp32", "as_bf16", "as_fp8"))
        assert not changed(eight, full)
        assert {full[name].dtype for name in full if name.startswith(f"{STATE}exp_avg")} == {torch.float32}
        assert not [name for name in open_source(runs / "as_fp32").names() if "exp_avg_scale" in name]
        moments = [name for name in half if half[name].dtype is torch.bfloat16]
        assert len(moments) > 20
        assert all(torch.equal(full[name].bfloat16(), half[name]) for name in moments)
        for name in changed(eight, again):
            assert float((eight[name] - again[name]).abs().max() / eight[name].abs().max()) < 0.13

    def test_trains_on(self, runs: Path) -> None:
        assert open_source(runs / "narrow_tp").step == 3

    def test_copies_are_exact_and_tools_see_numbers(self, runs: Path, tmp_path: Path) -> None:
        def in_a_fork(ranks: RankEnv) -> None:  # tensorstore works in no fork of a process that has used it
            run = runs / "wide"
            archive(run, 2, tmp_path / "archive")
            restore(tmp_path / "archive", tmp_path / "restored")
            reshard(tmp_path / "archive", None, tmp_path / "resharded")
            for copy in (tmp_path / "restored", tmp_path / "resharded"):
                one, other = open_source(run), open_source(copy)
                assert one.names() == other.names()
                assert all(torch.equal(one.read(name), other.read(name)) for name in one.names()), copy
            assert diff((run, None), (tmp_path / "archive", None))["equal"]
            name = "layers.1.mlp.experts.image.w1"
            shown = values(run, name=f"{STATE}exp_avg_sq.decoder.{name}", box="0,3:7,1,100:140")
            source = decoded(open_source(run))
            whole = source.read(f"{STATE}exp_avg_sq.decoder.{name}")
            assert shown["values"] == whole[0, 3:7, 1, 100:140].tolist()
            assert 0 < shown["max"] < 1 and shown["dtype"] == "float32"
            apart = diff((runs / "narrow", None), (runs / "as_fp32", None))
            assert apart["max_abs"] == 0.0 and not apart["only_in_one"] and not apart["other_shape"]

        run_ranks(in_a_fork, world_size=1)


def test_a_checkpoint_is_as_small_as_said(tmp_path: Path) -> None:
    """Moments of matrices take 2.375 bytes in files (a scale stands in both halves of a group), instead of 8."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        config = made("moma", "fp8_coat", wide=True)
        groups = process_groups.initialize_layout(seed=config.run.seed)
        parts = build(config, groups)
        state = TrainState(parts.chunks, parts.optimizer)
        train(config, parts, state, until=1)
        entries = [
            shard
            for shard in _shards(state.sharded(loading=False)["optimizer"])
            if any(shard.key.startswith(f"{STATE}{name}") for name in MOMENTS) and "experts" in shard.key
        ]
        numel = sum(
            parameter.numel()
            for chunk in parts.chunks
            for name, parameter in chunk.named_parameters()
            if "experts" in name
        )
        assert sum(shard.data.nbytes for shard in entries) == pytest.approx(2.375 * numel)
        process_groups.destroy_layout()
        process_groups.finalize()

    run_ranks(ranks_do, world_size=1)


def _shards(entry: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in nested_values(entry) if isinstance(value, ShardedTensor)]
