"""NaN, Inf and spikes under every kind of layout: all ranks agree, nothing is applied, and what follows is exact.

Faults are put into one rank's gradient in the middle of backward, before any reduction, or into a loss or gradient on
one rank after all reductions; everything else is the real thing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.stream.loader import StepBatch
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.vocab import Vocabulary
from mmscale.errors import TrainingError
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import assembly
from mmscale.train.loop import Trainer
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.step_guard import StepGuard
from mmscale.train.steps.step_report import StepReport
from mmscale.train.throughput import Throughput
from tests.distributed.test_resume import OVERLAPPED, settings, start
from tests.support import distributed, run_ranks

BATCH = 8  # sequences of a step


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def with_policy(config: Config, *, steps: int, every: int = 0, **anomaly: Any) -> Config:
    policy = config.resilience.anomaly.model_copy(update=anomaly)
    made = changed(changed(config, "resilience", anomaly=policy), "train", steps=steps)
    made = changed(made, "model", num_layers=2)
    return changed(changed(made, "checkpoint", every=every), "optim", warmup=2)


class Stream(Iterator[StepBatch]):
    """This rank's part of every global batch, as BatchLoader gives it, of synthetic micro-batches."""

    def __init__(
        self,
        config: Config,
        parts: assembly.TrainingParts,
        sequences: int,
        *,
        bad: tuple[int, ...] = (),
        without: tuple[int, ...] = (),
    ) -> None:
        self.config, self.bad, self.without = config, bad, without
        self.dp = parts.groups.dp
        share = config.model.experts.share
        assert isinstance(share, dict)
        self.mixture = SyntheticMixture(config, share=share)
        self.sequences = sequences

    def __next__(self) -> StepBatch:
        while self.sequences // BATCH in self.without:
            self.sequences += BATCH
        size, per_step = self.config.train.micro_batch_size, global_micro_batches(self.config)
        first = self.sequences // size
        number = self.sequences // BATCH
        mine = [self.mixture.micro_batch(n) for n in range(first + self.dp.rank(), first + per_step, self.dp.size())]
        if number in self.bad:
            mine = [repetitive(micro_batch) for micro_batch in mine]
        self.sequences += BATCH
        return StepBatch(tuple(mine), counts=(60, 40), label_counts=(50, 40), index=first)


def repetitive(batch: MicroBatch) -> MicroBatch:
    """Nothing but one word, over and over: the kind of data that makes gradients spike (OLMo 2)."""
    tokens = np.where(batch.modality_ids == 0, 17, batch.tokens)
    return replace(batch, tokens=tokens, labels=np.where(batch.loss_mask > 0, 23, batch.labels))


class Killed(BaseException):
    """The end of a process: nothing is saved, nothing is told."""


@dataclass
class Life:
    """What a run did, as one rank saw it."""

    losses: dict[int, float] = field(default_factory=dict)  # by step, the last time it was done
    norms: dict[int, float] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kill_at: int | None = None

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if report.step == self.kill_at:
            raise Killed
        self.losses[report.step] = report.result.losses["loss"]
        self.norms[report.step] = report.result.grad_norm

    def on_event(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]


Fault = Callable[[assembly.TrainingParts, TrainState], None]


def live(
    config: Config,
    parts: assembly.TrainingParts,
    state: TrainState,
    *,
    fault: Fault | None = None,
    bad: tuple[int, ...] = (),
    without: tuple[int, ...] = (),
    folder: Path | None = None,
    kill_at: int | None = None,
) -> Life:
    """Train to the last step, with the real loop and guard."""
    life = Life(kill_at=kill_at)
    if fault is not None:
        fault(parts, state)
    stream = Stream(config, parts, state.sequences, bad=bad, without=without)
    checkpoints = manager(config, folder) if folder is not None else None

    def load_newest() -> int | None:
        newest = checkpoints.choose() if checkpoints else None
        if checkpoints and newest is not None:
            checkpoints.load(state, newest)
        return newest

    def seek(sequences: int) -> None:
        stream.sequences = sequences

    class Unsaved:
        def due(self, step: int) -> bool:
            return False

        def save(self, state: TrainState, *, last: bool = False) -> None:
            pass

    guard = StepGuard(
        config,
        state=state,
        stepper=parts.stepper,
        load_newest=load_newest,
        seek=seek,
        on_event=life.on_event,
        warn=life.warnings.append,
    )
    trainer = Trainer(
        config,
        state=state,
        stepper=parts.stepper,
        guard=guard,
        batches=stream,
        vocabulary=Vocabulary.from_config(config.vocab),
        hooks=[life],
        checkpoints=checkpoints or Unsaved(),
        stop_requested=lambda: False,
        clock=Throughput(),
    )
    with contextlib.suppress(Killed):
        trainer.fit()
    return life


def manager(config: Config, folder: Path) -> CheckpointManager:
    return CheckpointManager(
        folder, every=config.checkpoint.every, keep=9, attempt=1, info={}, on_event=lambda *_, **__: None
    )


def build(config: Config) -> tuple[assembly.TrainingParts, TrainState]:
    parallel = config.parallel
    groups = process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=config.run.seed
    )
    device.set_seeds(config.run.seed)
    parts = assembly.build(config, groups)
    return parts, TrainState(parts.chunks, parts.optimizer)


def content(parts: assembly.TrainingParts) -> dict[str, bytes]:
    """Weights, masters, moments, step counts and learning rates of this rank, byte by byte."""
    found: dict[str, bytes] = {}
    with parts.stepper.materialized():
        for number, chunk in enumerate(parts.chunks):
            for name, param in chunk.named_parameters():
                found[f"{number}.{name}"] = param.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    for number, part in enumerate(parts.optimizer.chained_optimizers):  # type: ignore[attr-defined]
        for place, group in enumerate(part.param_groups):
            found[f"{number}.{place}"] = repr({k: v for k, v in group.items() if k != "params"}).encode()
            for index, param in enumerate(group["params"]):
                values = {"master": param, **part.optimizer.state[param]}
                for name, value in values.items():
                    found[f"{number}.{place}.{index}.{name}"] = value.detach().clone().numpy().tobytes()
    return found


# --- faults ---------------------------------------------------------------------------------------------------------


def in_backward(value: float, *, rank: int, batch: int, times: int) -> Fault:
    """One element of one gradient of one rank, before any reduction, when this batch is computed."""

    def install(parts: assembly.TrainingParts, state: TrainState) -> None:
        if torch.distributed.get_rank() != rank:
            return
        left = [times]
        accumulate = parts.stepper.accumulate

        def noted(batches: Any) -> torch.Tensor:
            armed[0] = state.sequences // BATCH == batch and left[0] > 0
            left[0] -= int(armed[0])
            return accumulate(batches)

        def poison(grad: torch.Tensor) -> torch.Tensor:
            if not armed[0]:
                return grad
            broken = grad.clone()
            broken.view(-1)[3] = value
            return broken

        armed = [False]
        next(iter(parts.chunks[0].parameters())).register_hook(poison)
        parts.stepper.accumulate = noted  # type: ignore[method-assign]

    return install


def after_reduction(
    change: Callable[[assembly.TrainingParts, torch.Tensor], torch.Tensor], *, rank: int, batch: int
) -> Fault:
    """In what a rank holds when all is reduced, each time this batch is computed."""

    def install(parts: assembly.TrainingParts, state: TrainState) -> None:
        accumulate = parts.stepper.accumulate

        def faulty(batches: Any) -> torch.Tensor:
            sums = accumulate(batches)
            if torch.distributed.get_rank() == rank and state.sequences // BATCH == batch:
                return change(parts, sums)
            return sums

        parts.stepper.accumulate = faulty  # type: ignore[method-assign]

    return install


def inf_in_the_loss(parts: assembly.TrainingParts, sums: torch.Tensor) -> torch.Tensor:
    """A loss may be infinite while every gradient is finite: -log of a probability that rounds to 0."""
    broken = sums.clone()
    broken[0, 0] = math.inf
    return broken


def inf_in_a_copy(parts: assembly.TrainingParts, sums: torch.Tensor) -> torch.Tensor:
    """In the gradient of a norm, of which the gradient norm counts tensor-parallel rank 0's copy only."""
    copies = [p for n, p in parts.chunks[0].named_parameters() if n.endswith("norm.weight")]
    assert copies and not getattr(copies[0], "tensor_model_parallel", False)
    copies[0].main_grad.view(-1)[0] = math.inf
    return sums


# --- NaN and Inf ----------------------------------------------------------------------------------------------------

LAYOUTS: list[Any] = [
    pytest.param("moma", "fp32", {}, math.nan, marks=pytest.mark.exhaustive),  # OVERLAPPED has as many replicas
    pytest.param("dense", "fp32", {"tp": 2}, math.inf, marks=pytest.mark.long),
    pytest.param("moma_depth", "bf16", {"pp": 2}, math.nan, marks=pytest.mark.long),
    pytest.param("moma", "bf16", {"ep": 2}, math.inf, marks=pytest.mark.long),
    ("moma", "fp32", OVERLAPPED, math.nan),
]


@pytest.mark.parametrize(("model", "dtype", "parallel", "value"), LAYOUTS)
def test_a_fault_is_computed_away_and_bad_data_is_left_out(
    model: str, dtype: str, parallel: Mapping[str, Any], value: float, tmp_path: Path
) -> None:
    """NaN on one of two ranks in step 2. Once: the run is the one without it. Always: as if the batch did not exist."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = with_policy(settings(model, dtype=dtype, parallel=parallel), steps=3)
        made = changed(made, "model", dropout=0.1)

        limited = changed(made, "optim", grad_norm_skip_threshold=1e4)

        def one(
            fault: Fault | None, without: tuple[int, ...] = (), made: Config = made
        ) -> tuple[Life, dict[str, bytes], TrainState]:
            parts, state = build(made)
            life = live(made, parts, state, fault=fault, without=without)
            found = content(parts)
            process_groups.destroy_layout()
            return life, found, state

        plain, after_all, _ = one(None)
        life, found, state = one(in_backward(value, rank=1, batch=1, times=1))
        assert life.names() == ["fault_transient"], life.warnings
        assert (life.losses, life.norms) == (plain.losses, plain.norms)
        assert found == after_all
        assert state.anomalies.counts == {"fault_transient": 1} and state.anomalies.skipped == []
        assert "gone when the batch was computed again" in life.warnings[0]

        # Twice in one batch: left out. The third attempt would be sound, but a batch is replayed once.
        life, found, state = one(in_backward(value, rank=1, batch=1, times=2))
        assert life.names() == ["skip"], life.warnings
        assert (state.step, state.sequences) == (3, 4 * BATCH)
        assert state.anomalies.skipped == [[BATCH, 2 * BATCH]]
        never, after_never, _ = one(None, without=(1,))
        assert (life.losses, life.norms) == (never.losses, never.norms)
        assert found == after_never
        assert never.losses[1] == plain.losses[1] and never.losses[2] != plain.losses[2]

        # A finite gradient whose norm is above optim.grad_norm_skip_threshold: left out likewise, at the first sight.
        life, found, state = one(in_backward(1e10, rank=1, batch=1, times=1), made=limited)
        assert life.names() == ["skip"] and "above 10000" in life.warnings[0]
        assert state.anomalies.counts == {"above_limit": 1, "skip": 1}
        assert (life.losses, life.norms) == (never.losses, never.norms)
        assert found == after_never
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2)


@pytest.mark.long
@distributed(world_size=2)
def test_a_step_that_is_refused_leaves_no_trace(ranks: RankEnv) -> None:
    """Weights, fp32 masters, moments, step counts and learning rates are the bytes of before; the budget ends it."""
    start(ranks)
    for dtype, parallel, optimizer in (
        ("fp32", {}, "adamw"),
        ("bf16", {"tp": 2}, "adamw"),
        ("fp32", {"tp": 2}, "muon"),
    ):
        base = changed(settings("moma", dtype=dtype, parallel=parallel), "optim", optimizer=optimizer)
        made = with_policy(base, steps=2)
        parts, state = build(made)
        live(made, parts, state)
        before = content(parts)
        again = with_policy(base, steps=3, budget=2)
        fault = after_reduction(inf_in_the_loss, rank=1, batch=2)
        # From here on every batch is broken.
        everywhere = after_reduction(inf_in_the_loss, rank=1, batch=3)
        fault(parts, state)
        everywhere(parts, state)
        after_reduction(inf_in_the_loss, rank=1, batch=4)(parts, state)
        with pytest.raises(TrainingError) as error:
            live(again, parts, state)
        assert "step 3: grad_norm nan" in error.value.cause and "budget of 2" in error.value.cause
        assert "again" in error.value.cause and error.value.exit_status == 5
        assert content(parts) == before
        assert (state.step, state.sequences) == (2, 4 * BATCH)
        assert state.anomalies.skipped == [[2 * BATCH, 4 * BATCH]]
        assert state.anomalies.counts == {"nonfinite": 3, "skip": 2}
        process_groups.destroy_layout()
    process_groups.finalize()


@distributed(world_size=2)
def test_what_the_gradient_norm_does_not_count_is_seen_too(ranks: RankEnv) -> None:
    """An Inf in a copy on tensor-parallel rank 1, or in the loss of the last stage only: both ranks refuse the step."""
    start(ranks)
    for parallel, change in (({"tp": 2}, inf_in_a_copy), ({"pp": 2}, inf_in_the_loss)):
        made = with_policy(settings("dense", parallel=parallel), steps=2)
        parts, state = build(made)
        life = live(made, parts, state, fault=after_reduction(change, rank=1, batch=1))
        assert life.names() == ["skip"]
        assert state.sequences == 3 * BATCH
        process_groups.destroy_layout()
    process_groups.finalize()
