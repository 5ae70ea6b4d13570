"""A run that was stopped goes on as if it had not been: the same numbers on the same layout, and on any other.

Checkpoints are compared by what they hold: every global tensor of weights and optimizer, whatever layout wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.vocab import Vocabulary
from mmscale.model.choices import Choices
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import TrainingParts, build
from mmscale.train.optim.schedule import learning_rate
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import with_share
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.batch import part_of, to_device
from mmscale.train.steps.step import mean_losses, reduce_sums
from tests.distributed.layouts import config, start
from tests.support import run_ranks

STEPS = 4
# Summation order only. A lost moment of Adam, or a batch that is read twice, shows in the third digit.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Taken:
    """Losses and gradient norms of some steps."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.losses + other.losses, self.norms + other.norms)


def settings(model: str, *, dtype: str = "fp32", parallel: Mapping[str, Any] | None = None) -> Config:
    """As in the layout tests, with a learning rate that changes every step."""
    made = with_share(config(model, dtype=dtype, parallel=parallel, data={"document_multiple": 4}))
    optim = made.optim.model_copy(update={"schedule": "cosine", "warmup": 2, "weight_decay": 0.1})
    return made.model_copy(update={"optim": optim})


def leg(
    settings: Config, folder: Path, *, load: int | None, until: int, choices: Choices | None = None, **options: Any
) -> Taken:
    """Fresh process groups, model and optimizer; load a step or start anew, train, save, and end it all.

    `choices` records or repeats which tokens were chosen. Options are the checkpoint manager's.
    """
    parallel = settings.parallel
    groups = process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=settings.run.seed
    )
    try:
        parts = build(settings, groups)
        state = TrainState(parts.chunks, parts.optimizer, routers=parts.routers)
        options = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": _ignore_event} | options
        checkpoints = CheckpointManager(folder, **options)
        if load is not None:
            checkpoints.load(state, load)
            assert state.step == load
            assert state.sequences == load * settings.train.global_batch_size
        taken = train(settings, parts, state, until=until, choices=choices)
        with parts.stepper.materialized():
            checkpoints.save(state, last=True)
        return taken
    finally:
        process_groups.destroy_layout()


def _ignore_event(*event: object, **fields: object) -> None:
    """Nobody listens to the manager's events here."""


def train(
    settings: Config, parts: TrainingParts, state: TrainState, *, until: int, choices: Choices | None = None
) -> Taken:
    """The loop without its surroundings: the batch follows from what the state says was consumed."""
    share = settings.model.experts.share
    assert isinstance(share, dict)
    mixture = SyntheticMixture(settings, share=share)
    vocabulary = Vocabulary.from_config(settings.vocab)
    own, per_step = part_of(parts.groups), global_micro_batches(settings)
    losses, norms = [], []
    while state.step < until:
        first = state.sequences // settings.train.micro_batch_size
        lr = learning_rate(settings.optim, step=state.step + 1, steps=STEPS, tokens=state.tokens)
        batches = [to_device(content, vocabulary) for content in own.batch(mixture, first, per_step)]
        for batch in batches:
            batch.params.choices = choices
        result = parts.stepper.train(batches, lr=lr)
        state.step += 1
        state.sequences += settings.train.global_batch_size
        losses.append(mean_losses(reduce_sums(result.sums, parts.groups), settings.vocab.names)["loss"])
        norms.append(result.grad_norm)
    return Taken(tuple(losses), tuple(norms))


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """Every global tensor of a checkpoint by its key; needs a process group."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(str(folder / "checkpoints" / f"step_{step:08d}"))
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all tensors, each measured against its own largest element (Adam's second moments are tiny)."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in one), sorted(one)
    return max(
        float((one[key].double() - other[key].double()).abs().max() / one[key].double().abs().max().clamp_min(1e-12))
        for key in one
    )


def assert_weights_are_newest(saved: dict[str, Tensor]) -> None:
    """The model's weights are those of the optimizer, rounded: evaluation and conversion read the model's only."""
    prefix = "optimizer.state.param."
    masters = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert masters and masters.keys() <= saved.keys()
    stale = [key for key, value in masters.items() if not torch.equal(value.to(saved[key].dtype), saved[key])]
    assert not stale, f"weights of an earlier step: {stale}"


# Parameters of other ranks arrive in the next forward pass: a checkpoint must not hold those of the step before.
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SAME: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fp32": [
        ("moma_depth_joint", {"pp": 2, "vpp": 2}),
        ("moma_post_per_expert_shared", {"tp": 2}),
        ("moma", OVERLAPPED),
        ("moma_depth_joint", {"cp": 2, "ep": 2}),
    ],
    "bf16": [("moma_depth_joint", {"ep": 2})],
}
SAME_TOO: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fp32": [
        ("dense", {"tp": 2}),
        ("moma_depth", {"ep": 2}),
        ("moma_frozen", {"ep": 2}),
        ("moma_token_choice", {"ep": 2}),
    ],
    "bf16": [("dense", {})],
}


@pytest.mark.parametrize("rows", [SAME, pytest.param(SAME_TOO, marks=pytest.mark.exhaustive)], ids=["", "more"])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_same_layout_goes_on_exactly(
    tmp_path: Path, dtype: str, rows: dict[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    """Four steps in one go equal two, a checkpoint, new process groups, and two more: bit for bit."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (model, parallel) in enumerate(rows[dtype]):
            made = settings(model, dtype=dtype, parallel=parallel)
            whole, halves = tmp_path / f"{number}_whole", tmp_path / f"{number}_halves"
            uninterrupted = leg(made, whole, load=None, until=STEPS)
            resumed = leg(made, halves, load=None, until=2) + leg(made, halves, load=2, until=STEPS)
            assert resumed == uninterrupted, f"{model} {parallel}: {resumed} instead of {uninterrupted}"
            one, other = tensors(whole, STEPS), tensors(halves, STEPS)
            assert largest_difference(one, other) == 0.0, (model, parallel)
            assert_weights_are_newest(one)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


CHAIN: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("one process", 1, {}),
    ("four ranks: tp 2, ep 2", 4, {"tp": 2, "ep": 2}),
    ("tp 2", 2, {"tp": 2}),
    ("pp 2", 2, {"pp": 2}),
    ("cp 2", 2, {"cp": 2}),
    ("ep 2", 2, {"ep": 2}),
    ("cp 2, ep 2", 2, {"cp": 2, "ep": 2}),
    ("pp 2, two chunks a stage", 2, {"pp": 2, "vpp": 2}),
    ("dp 2", 2, {}),
    ("one process again", 1, {}),
)


def _chain(model: str, folder: Path, legs: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    """A step under each layout, each reading what the one before wrote; equal to one process that never stopped."""
    differences: dict[str, float] = {}
    for done, (_, world_size, parallel) in enumerate(legs):

        def ranks_do(ranks: RankEnv, done: int = done, parallel: dict[str, Any] = parallel) -> None:
            start(ranks)
            made = settings(model, parallel=parallel)
            taken = leg(made, folder / "chain", load=done or None, until=done + 1)
            if ranks.rank == 0:
                (folder / f"loss_{done}").write_text(f"{taken.losses[0]!r} {taken.norms[0]!r}")
            process_groups.finalize()

        run_ranks(ranks_do, world_size=world_size)

    def alone(ranks: RankEnv) -> None:
        start(ranks)
        taken = leg(settings(model), folder / "alone", load=None, until=len(legs))
        for done, (name, _, _) in enumerate(legs):
            loss, norm = map(float, (folder / f"loss_{done}").read_text().split())
            differences[name] = max(abs(loss - taken.losses[done]), abs(norm - taken.norms[done]) / norm)
        assert max(differences.values()) <= TOLERANCE, differences
        state = largest_difference(tensors(folder / "alone", len(legs)), tensors(folder / "chain", len(legs)))
        # Adam divides by the root of the second moment, which magnifies rounding of the smallest gradients.
        assert state <= 100 * TOLERANCE, f"weights or optimizer state differ by {state:.1e} of their largest element"
        process_groups.finalize()

    run_ranks(alone, world_size=1)


# Each kind of parallelism once, where a layout has two of them at once.
SHORT = [CHAIN[number] for number in (0, 1, 6, 7, 8, 9)]


@pytest.mark.parametrize("legs", [SHORT, pytest.param(CHAIN, marks=pytest.mark.exhaustive)], ids=["", "all"])
def test_moma_goes_on_under_every_other_layout(tmp_path: Path, legs: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    """Auxiliary routers of a joint run, their optimizer and averaged thresholds with it."""
    _chain("moma_depth_joint", tmp_path, legs)


@pytest.mark.long
def test_token_choice_goes_on_under_other_layouts(tmp_path: Path) -> None:
    """Biases are among the tensors that are compared."""
    legs = [CHAIN[number] for number in (1, 4, 7, 9)]
    _chain("moma_token_choice", tmp_path, legs)


@pytest.mark.exhaustive
def test_dense_goes_on_under_other_layouts(tmp_path: Path) -> None:
    _chain("dense", tmp_path, [("dp 2", 2, {}), ("tp 2, pp 2", 4, {"tp": 2, "pp": 2}), ("one process", 1, {})])


NEXT = 4
MATRIX: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"tp": 2}),
    (2, {"pp": 2, "vpp": 2}),
    (2, {"ep": 2}),
    (1, {}),
)


# Every change has one of them: the chain above reads under each of these layouts what another one wrote.
@pytest.mark.long
@pytest.mark.parametrize("matrix", [MATRIX[1:2], pytest.param(MATRIX, marks=pytest.mark.exhaustive)], ids=["", "all"])
def test_the_next_four_steps_under_every_layout(tmp_path: Path, matrix: tuple[tuple[int, dict[str, Any]], ...]) -> None:
    """Row 16 of the fault matrix: saved by four ranks, asynchronously, after two steps; with the optimizer's state.

    Of two tokens with nearly equal logits another processor's rounding may choose the other one, which moves a loss by
    2e-6. So the choices of one process are repeated, and few may differ.
    """

    def constant(parallel: dict[str, Any]) -> Config:
        made = settings("moma_depth", parallel=parallel)
        return made.model_copy(update={"optim": made.optim.model_copy(update={"schedule": "constant"})})

    def life(name: str, world_size: int, parallel: dict[str, Any], *, load: int | None, until: int) -> list[float]:
        def ranks_do(ranks: RankEnv) -> None:
            start(ranks)
            saves, choices = SaveSettings(asynchronous=True), Choices(tmp_path / "choices", repeat=name != "whole")
            taken = leg(constant(parallel), tmp_path / "run", load=load, until=until, choices=choices, saves=saves)
            if name == "whole":
                choices.save()
            else:
                assert choices.compared > 1000 and choices.differing <= 0.005 * choices.compared
            if ranks.rank == 0:
                (tmp_path / name).write_text(" ".join(map(repr, (*taken.losses, *taken.norms))))
            process_groups.finalize()

        run_ranks(ranks_do, world_size=world_size)
        return [float(word) for word in (tmp_path / name).read_text().split()]

    whole = life("whole", 1, {}, load=None, until=2 + NEXT)
    losses, norms = whole[2 : 2 + NEXT], whole[4 + NEXT :]
    life("first", 4, {"tp": 2, "ep": 2}, load=None, until=2)
    for number, (world_size, parallel) in enumerate(matrix):
        found = life(f"{number}", world_size, parallel, load=2, until=2 + NEXT)
        differences = [abs(a - b) for a, b in zip(found[:NEXT], losses, strict=True)]
        differences += [abs(a - b) / b for a, b in zip(found[NEXT:], norms, strict=True)]
        assert max(differences) <= TOLERANCE, (parallel, differences)
