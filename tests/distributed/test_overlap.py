"""Overlapped communication with many small buckets: same losses, and a checkpoint holds the newest parameters."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.optim import optimizer
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.step import Stepper, mean_losses, reduce_sums
from tests.distributed.layouts import config
from tests.support import run_ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def _train(settings: Config, folder: Path, *, materialize: bool = True) -> list[float]:
    """Three steps, then a checkpoint."""
    parallel = settings.parallel
    pg = groups.initialize_layout(pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=1)
    share = settings.model.experts.share
    assert isinstance(share, dict)
    mixture = SyntheticMixture(settings, share=share)
    transformer = transformer_config(settings)
    chunks = optimizer.wrap(settings, transformer, build_chunks(settings, pg, transformer=transformer), pg)
    stepper = Stepper(settings, chunks, optimizer.make_optimizer(settings, chunks, pg), pg)
    losses = []
    for step in range(3):
        numbers = range(step * 4 + pg.dp.rank(), (step + 1) * 4, pg.dp.size())
        batches = [to_device(mixture.micro_batch(number), mixture.vocabulary) for number in numbers]
        losses.append(mean_losses(reduce_sums(stepper.train(batches, lr=1e-3).sums, pg), ("text", "image"))["loss"])
    state = TrainState(chunks, None)
    checkpoints = CheckpointManager(folder, every=0, keep=1, attempt=1, info={}, on_event=lambda *_, **__: None)
    with stepper.materialized() if materialize else contextlib.nullcontext():
        checkpoints.save(state)
    groups.destroy_layout()
    return losses


def _difference(first: Path, second: Path) -> float:
    """Largest difference of any tensor of two checkpoints."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    a, b = (load_plain_tensors(str(Store.of_run(folder).path(0))) for folder in (first, second))
    assert a.keys() == b.keys()
    assert len(a) > 30
    return max(float((a[key] - b[key]).abs().max()) for key in a if isinstance(a[key], torch.Tensor))


def test_overlap_trains_and_saves_the_same(tmp_path: Path) -> None:
    """Many buckets, so that every module must wait for its own; saving without settling is the negative control."""

    def steps(ranks: RankEnv) -> None:
        optimizer.BUCKET_ELEMENTS = 3000
        groups.start(ranks)
        for name, layout in {"dp2": {}, "ep2": {"ep": 2}}.items():
            plain, overlapped = ({**layout}, {**layout, **OVERLAP})
            losses = [
                _train(config("moma_depth", parallel=parallel), tmp_path / f"{name}_{index}")
                for index, parallel in enumerate((plain, overlapped))
            ]
            assert losses[0] == losses[1], name
            assert _difference(tmp_path / f"{name}_0", tmp_path / f"{name}_1") == 0.0, name
        _train(config("moma_depth", parallel=OVERLAP), tmp_path / "not_materialized", materialize=False)
        assert _difference(tmp_path / "dp2_0", tmp_path / "not_materialized") > 1e-5
        groups.finalize()

    run_ranks(steps, world_size=2)
