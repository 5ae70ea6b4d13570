"""A restart draws the random numbers that it would have drawn, and takes its settings from the configuration."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.runtime import groups as process_groups
from mmscale.runtime import random_state
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.state.train_state import TrainState
from tests.distributed.test_resume import settings, start, train
from tests.support import distributed, run_ranks

STEPS, HALF = 6, 3


def with_dropout(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.1})})


def leg(config: Config, folder: Path, ranks: RankEnv, *, load: int | None, until: int, seed: int) -> str:
    """One life of a run: losses and gradient norms as hex floats, and a hash of this rank's parameters."""
    start(ranks)
    groups = process_groups.initialize_layout(seed=config.run.seed)
    parts = build(config, groups)
    random_state.device.set_seeds(seed + ranks.rank)
    state = TrainState(parts.chunks, parts.optimizer)
    checkpoints = CheckpointManager(folder, every=0, keep=9, attempt=1, info={}, on_event=lambda *_, **__: None)
    if load is not None:
        checkpoints.load(state, load)
    taken = train(config, parts, state, until=until)
    checkpoints.save(state)
    content = hashlib.sha256()
    for chunk in parts.chunks:
        for parameter in chunk.parameters():
            content.update(parameter.detach().float().numpy().tobytes())
    process_groups.finalize()
    return "\n".join(map(float.hex, taken.losses + taken.norms)) + f"\n{content.hexdigest()}"


@pytest.mark.long
def test_dropout_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """Two ranks, 3 steps + a save + new processes with another seed + 3 steps, against 6 steps in one go."""
    config = with_dropout(settings("moma"))
    assert config.model.dropout == 0.1

    def life(name: str, *, load: int | None, until: int, seed: int) -> list[list[str]]:
        def ranks_do(ranks: RankEnv) -> None:
            text = leg(config, tmp_path / name, ranks, load=load, until=until, seed=seed)
            (tmp_path / f"{name}_{until}_{ranks.rank}").write_text(text)

        run_ranks(ranks_do, world_size=2)
        return [(tmp_path / f"{name}_{until}_{rank}").read_text().splitlines() for rank in range(2)]

    whole = life("whole", load=None, until=STEPS, seed=1)
    first = life("halves", load=None, until=HALF, seed=1)
    second = life("halves", load=HALF, until=STEPS, seed=999)
    for rank in range(2):
        losses, norms = whole[rank][:STEPS], whole[rank][STEPS : 2 * STEPS]
        assert first[rank][:HALF] + second[rank][:HALF] == losses
        assert first[rank][HALF : 2 * HALF] + second[rank][HALF : 2 * HALF] == norms
        assert second[rank][-1] == whole[rank][-1]
    # It would show: other random numbers give other losses.
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    other = life("other", load=None, until=HALF, seed=2)
    assert other[0][:HALF] != whole[0][:HALF]


@distributed(world_size=1)
def test_the_configuration_wins_over_what_a_checkpoint_says(ranks: RankEnv, tmp_path: Path) -> None:
    """Learning rate, weight decay, betas and epsilon are those of the new configuration; moments and step are kept."""
    start(ranks)
    old = settings("dense")
    new = old.model_copy(
        update={
            "optim": old.optim.model_copy(
                update={"lr": 7e-3, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.7, "eps": 2e-5, "warmup": 0}
            )
        }
    )
    updates = {}
    for name, config in (("old", old), ("new", new)):
        groups = process_groups.initialize_layout(seed=config.run.seed)
        parts = build(config, groups)
        state = TrainState(parts.chunks, parts.optimizer)
        checkpoints = CheckpointManager(tmp_path, every=0, keep=9, attempt=1, info={}, on_event=lambda *_, **__: None)
        if name == "old":
            train(config, parts, state, until=2)
            checkpoints.save(state)
        else:
            checkpoints.load(state, 2)
            wanted = config.optim
            for group in parts.optimizer.param_groups:
                assert group["betas"] == (wanted.beta1, wanted.beta2) and group["eps"] == wanted.eps
                assert group["max_lr"] == wanted.lr
                assert group["step"] == 2 or not group["params"]
        before = torch.cat([p.detach().flatten().clone() for p in parts.chunks[0].parameters()])
        train(config, parts, state, until=3)
        after = torch.cat([p.detach().flatten() for p in parts.chunks[0].parameters()])
        updates[name] = float((after - before).abs().max())
        used = {group["lr"] for group in parts.optimizer.param_groups}
        assert max(used) <= config.optim.lr
        for group in parts.optimizer.param_groups:
            assert group["weight_decay"] == config.optim.weight_decay * group["wd_mult"]
        process_groups.destroy_layout()
    assert updates["new"] > 2 * updates["old"]  # seven times the peak, half-way down the cosine
    process_groups.finalize()
